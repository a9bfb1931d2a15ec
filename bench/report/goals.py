"""Goals of the benchmarks, and whether they are met."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.report.statistics import quantile
from bench.workload.arrivals import Answer

SHORT, LONG = 8, 40
"""Steps of the classes that the goals name."""


@dataclass(frozen=True, slots=True)
class Goal:
    """``reached`` must be at least ``bound``, or at most if ``at_least`` is false.

    ``between``: the smallest and the largest value of the rounds of which ``reached`` is the
    median, or its confidence interval; None if there is neither. ``is_cost``: the worse end of
    ``between`` must reach the bound, not only the median.
    """

    name: str
    reached: float
    bound: float
    at_least: bool
    between: tuple[float, float] | None = None
    is_cost: bool = False

    @property
    def met(self) -> bool:
        """True if the goal is reached."""
        judged = self.reached
        if self.is_cost and self.between is not None:
            judged = self.between[0] if self.at_least else self.between[1]
        return judged >= self.bound if self.at_least else judged <= self.bound


def of_class(answers: Sequence[Answer], steps: int | None) -> list[float]:
    """The latencies of the class of ``steps`` in seconds; None is all classes."""
    return [each.latency for each in answers if steps is None or each.steps == steps]


def throughput_goals(images_per_second: Mapping[str, float]) -> list[Goal]:
    """Goals of the closed loop; the keys are "serial", "static" and "engine"."""
    ours = images_per_second["engine"]
    return [
        Goal(
            "throughput, against one call at a time", ours / images_per_second["serial"], 1.5, True
        ),
        Goal("throughput, against static batches", ours / images_per_second["static"], 1.25, True),
    ]


def latency_goals(answers: Mapping[str, Sequence[Answer]]) -> list[Goal]:
    """Goals of the open loop at 0.9 of the capacity of "serial"; the same keys."""

    def against(peers: Sequence[str], steps: int | None, share: float) -> float:
        ours, *theirs = (
            quantile(of_class(answers[name], steps), share) for name in ("engine", *peers)
        )
        return ours / min(theirs)

    both = ("serial", "static")
    return [
        Goal(f"p50 of {SHORT} steps, against the better", against(both, SHORT, 0.5), 0.45, False),
        Goal("p95 of all, against the better", against(both, None, 0.95), 0.7, False),
        Goal(
            f"p95 of {LONG} steps, against one call at a time",
            against(("serial",), LONG, 0.95),
            1.0,
            False,
        ),
    ]


def lone_goal(ratio: float) -> Goal:
    """Goal of a lone request; ``ratio`` is its time over that of a bare ``pipe()``."""
    return Goal("a lone request, against bare pipe()", ratio, 1.03, False)


def print_goals(goals: Sequence[Goal]) -> None:
    """Print one line for each goal."""
    for goal in goals:
        print(f"{'met' if goal.met else 'MISSED':7}{goal.name}: {goal.reached:.3f}")
