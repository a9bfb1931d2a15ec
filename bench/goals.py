"""What the engine is to reach beside ``pipe()``, and whether it does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.arrivals import Drawn
from bench.quantiles import quantile

SHORT, LONG = 8, 40
"""The classes, by their steps, that the goals name."""


@dataclass(frozen=True, slots=True)
class Goal:
    """``reached`` shall be ``at_least``, or at most, ``bound``; both are ratios.

    ``between``: the least and the most of the rounds that ``reached`` is the median of, or what
    else says how sure it is; None where nothing does.
    """

    name: str
    reached: float
    bound: float
    at_least: bool
    between: tuple[float, float] | None = None

    @property
    def met(self) -> bool:
        """True where the goal is reached."""
        return self.reached >= self.bound if self.at_least else self.reached <= self.bound


def of_class(drawn: Sequence[Drawn], steps: int | None) -> list[float]:
    """The latencies of one class, or of all."""
    return [each.latency for each in drawn if steps is None or each.steps == steps]


def throughput_goals(images_per_second: Mapping[str, float]) -> list[Goal]:
    """For the closed loop; the keys are "serial", "static" and "engine"."""
    ours = images_per_second["engine"]
    return [
        Goal(
            "throughput, against one call at a time", ours / images_per_second["serial"], 1.5, True
        ),
        Goal("throughput, against static batches", ours / images_per_second["static"], 1.25, True),
    ]


def latency_goals(drawn: Mapping[str, Sequence[Drawn]]) -> list[Goal]:
    """For the open loop at 0.9 of the capacity of one call at a time; keys as above."""

    def against(rivals: Sequence[str], steps: int | None, share: float) -> float:
        ours, *theirs = (
            quantile(of_class(drawn[name], steps), share) for name in ("engine", *rivals)
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
    """For a request that is alone; ``ratio`` is its time over that of a bare ``pipe()``."""
    return Goal("a lone request, against bare pipe()", ratio, 1.03, False)
