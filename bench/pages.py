"""Writes the measured sections of the pages from the results: ``python -m bench.pages``.

Each section is made from the newest results of its benchmark. The peers' section is made from the
results that it names, or from those of ``--peers``.
"""

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.engine import families
from bench.engine import plots as engine_plots
from bench.engine import report as engine_report
from bench.engine.loras import BENCHMARK as LORAS
from bench.gpu import report as gpu_report
from bench.micro.__main__ import BENCHMARKS as MICRO
from bench.peers.report.section import write_page
from bench.report.markdown import DOCS, write_section
from bench.report.results import RESULTS, Results, load, newest
from bench.serving.__main__ import BENCHMARKS as SERVING
from bench.trace.__main__ import BENCHMARKS as TRACE

SECTIONS: dict[str, tuple[str, Callable[[Results], str]]] = {
    "engine": ("benchmarks.md", engine_report.section),
    families.BENCHMARK.name: (families.BENCHMARK.page, families.BENCHMARK.section),
    "gpu": ("benchmarks.md", gpu_report.section),
    **{each.name: (each.page, each.section) for each in (LORAS, *MICRO, *SERVING, *TRACE)},
}
"""The page of each benchmark, and what makes its section; the peers' has several results."""


def peers_results(docs: Path = DOCS) -> list[Results]:
    """The results that the peers' section in ``docs`` names."""
    page = (docs / "benchmarks.md").read_text(encoding="utf-8")
    section = page.partition("<!-- bench:peers -->")[2].partition("<!-- /bench:peers -->")[0]
    return [load(RESULTS / name) for name in re.findall(r"bench/results/(\S+\.json)", section)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write every section that has results."""
    parser = argparse.ArgumentParser(prog="bench.pages", description=__doc__)
    parser.add_argument("--peers", type=Path, nargs="+", metavar="RESULTS", default=[])
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the pages")
    options = parser.parse_args(arguments)
    for name, (page, section) in SECTIONS.items():
        if (results := newest(name)) is not None:
            write_section(page, name, section(results), options.docs)
            if name == "engine":
                engine_plots.plot(results, options.docs / "images")
    write_page([load(path) for path in options.peers] or peers_results(), options.docs)


if __name__ == "__main__":
    main()
