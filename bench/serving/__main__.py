"""Measures estimates, overload, the HTTP door, the ledger and fleets.

``python -m bench.serving NAME ...``.

Each writes its results to ``bench/results`` and its section of a page in ``docs``.
"""

from collections.abc import Sequence

from bench.report.benchmark import run_named
from bench.serving import estimates, fleet_cancels, fleet_cost, http_door, ledger_cost, overload

MODULES = (estimates, overload, http_door, ledger_cost, fleet_cost, fleet_cancels)
BENCHMARKS = tuple(module.BENCHMARK for module in MODULES)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmarks that the command line names."""
    run_named(BENCHMARKS, "bench.serving", __doc__, arguments)


if __name__ == "__main__":
    main()
