"""Micro-benchmarks, one question each: ``python -m bench.micro NAME ...``.

Each writes its results to ``bench/results`` and its section of a page in ``docs``.
"""

from collections.abc import Sequence

from bench.micro import (
    boundary,
    exactness,
    lifecycle,
    memory,
    metrics_cost,
    spinning,
    submit,
    suspension,
    vae_layout,
)
from bench.report.benchmark import run_named

BENCHMARKS = tuple(
    module.BENCHMARK
    for module in (
        boundary,
        lifecycle,
        metrics_cost,
        submit,
        exactness,
        memory,
        suspension,
        spinning,
        vae_layout,
    )
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmarks that the command line names."""
    run_named(BENCHMARKS, "bench.micro", __doc__, arguments)


if __name__ == "__main__":
    main()
