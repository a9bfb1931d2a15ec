"""Counts which models fit which card, and writes the tables of docs/cards.md: ``make cards``.

Everything is counted on the meta device, from the configurations in this package: no weight is read
and no GPU is used.
"""

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

import diffusers

from bench.cards.models import MODELS
from bench.cards.page import count, sections
from bench.report.markdown import DOCS, write_section


def main(arguments: Sequence[str] | None = None) -> None:
    """Count every model and write the page."""
    parser = argparse.ArgumentParser(prog="bench.cards", description=__doc__)
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the page")
    options = parser.parse_args(arguments)
    # Advice for users of the modules, who have weights.
    diffusers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)
    counted = []
    for model in MODELS:
        counted.append(count(model))
        print(f"{model.name}: {counted[-1].weights() / 2**30:.2f} GiB of weights")
    for name, text in sections(counted).items():
        write_section("cards.md", name, text, options.docs)


if __name__ == "__main__":
    main()
