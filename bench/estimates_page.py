"""``docs/benchmarks.md``, the part on the estimates."""

from collections.abc import Sequence
from typing import NamedTuple

from bench.goals import Goal
from bench.quantiles import quantile
from bench.results import Results
from bench.sections import table
from bench.workload import STEPS


class Pair(NamedTuple):
    """Seconds that a request of so many steps was to take, and that it took."""

    steps: int
    estimate: float
    seconds: float

    @property
    def error(self) -> float:
        """How far off the estimate was, as a part of what came true."""
        return abs(self.estimate - self.seconds) / self.seconds


def goals(results: Results) -> list[Goal]:
    """The median error at each load."""
    return [
        Goal(f"median error at {load}", quantile([p.error for p in pairs], 0.5), 0.2, False)
        for load, pairs in _pairs(results).items()
    ]


def page(results: Results) -> str:
    """The section."""
    rows = [
        [
            f"{load} of the capacity",
            *(_error(pairs, steps, 0.5) for steps in (None, *STEPS)),
            _error(pairs, None, 0.9),
            f"{quantile([pair.estimate / pair.seconds for pair in pairs], 0.5):.2f}",
        ]
        for load, pairs in _pairs(results).items()
    ]
    heads = [
        "load",
        "median error",
        *(f"{steps} steps" for steps in STEPS),
        "p90 of all",
        "estimate / real, median",
    ]
    settings = results.settings
    note = f"\n\n{results.note}" if results.note else ""
    return (
        "## Estimates\n\n"
        f"{results.date}, {results.machine.text}. Each job's estimate at its acceptance beside the "
        "time that it took to its last image, as a part of the latter. "
        f"{settings['arrivals']} Poisson arrivals of the mixed workload at each load, where the "
        f"capacity is that of a closed loop of {settings['callers']} callers, "
        f"{results.figures['capacity']:.2f} images/s. An estimate cannot know who comes later. The "
        "goal is a median of 20 %.\n\n"
        f"{table(heads, rows)}\n\nMade by `make bench-estimates`.{note}"
    )


def _pairs(results: Results) -> dict[str, list[Pair]]:
    return {
        load: [Pair(*pair) for pair in pairs] for load, pairs in results.figures["pairs"].items()
    }


def _error(pairs: Sequence[Pair], steps: int | None, share: float) -> str:
    errors = [pair.error for pair in pairs if steps is None or pair.steps == steps]
    return f"{quantile(errors, share):.0%}" if errors else "–"
