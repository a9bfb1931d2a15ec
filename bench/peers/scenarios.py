"""What is asked of every peer, and when."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from bench.workload import (
    Request,
    bursts,
    mixed,
    poisson,
    sized,
    uniform,
    with_cancels,
    with_deadlines,
)

CALLERS = 8
"""Of a closed loop."""

UNIFORM = (16, 7.5)
"""Steps and guidance, where all requests are alike."""

SIDES = (0.75, 1.0, 1.5)
"""Of the model's own size, where sizes are mixed."""

PATIENCE = 5.0
"""A deadline is so many times what a request takes alone, as in AlpaServe (OSDI 2023)."""

CANCELS = 0.2
"""The share of callers that leave."""

LEAVING = 4.0
"""They do within so many times what their request takes alone."""


class Mix(StrEnum):
    """Which requests come."""

    MIXED = "mixed"
    UNIFORM = "uniform"
    SIZES = "sizes"

    @property
    def text(self) -> str:
        """In words, for a heading."""
        steps, guidance = UNIFORM
        return {
            Mix.MIXED: "mixed",
            Mix.UNIFORM: f"all alike ({steps} steps, guidance {guidance})",
            Mix.SIZES: f"mixed, sizes too ({', '.join(f'{s:g}' for s in SIDES)} of the usual)",
        }[self]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """``load`` is a share of (a)'s capacity for this mix, None in the closed loop.

    ``stream``: Darkroom alone, which tells of the progress. ``window``: those alone that batch,
    each of whose batches waits so many seconds for company; None for the peer's best.
    """

    mix: Mix = Mix.MIXED
    load: float | None = None
    bursts: bool = False
    deadlines: bool = False
    cancels: bool = False
    stream: bool = False
    window: float | None = None

    @property
    def name(self) -> str:
        """For tables and the command line: "mixed closed", "mixed 0.9 bursts"."""
        kinds = [k for k in ("bursts", "deadlines", "cancels", "stream") if getattr(self, k)]
        if self.window is not None:
            kinds.append(f"{self.window * 1000:g} ms")
        return " ".join([self.mix, "closed" if self.load is None else f"{self.load:g}", *kinds])

    def requests(
        self, count: int, seed: int, capacity: float, nominal: float, side: int
    ) -> list[Request]:
        """``count`` requests of this scenario, the same ones for the same arguments.

        ``capacity`` is (a)'s in images/s, ``nominal`` the seconds of a step of a lone request,
        ``side`` the model's own in pixels.
        """
        requests = mixed(count, seed)
        if self.mix is Mix.UNIFORM:
            requests = uniform(requests, *UNIFORM)
        elif self.mix is Mix.SIZES:
            requests = sized(requests, tuple(round(side * share) for share in SIDES), seed)
        if self.load is not None:
            rate = self.load * capacity
            requests = (bursts if self.bursts else poisson)(requests, rate, seed)
        if self.deadlines:
            requests = with_deadlines(requests, PATIENCE * nominal)
        if self.cancels:
            requests = with_cancels(requests, CANCELS, LEAVING * nominal, seed)
        return requests


CLOSED = Scenario()
BUSY = Scenario(load=0.9)
OVERLOAD = Scenario(load=1.1, deadlines=True)
LEAVERS = Scenario(load=0.9, cancels=True)
STREAMED = Scenario(load=0.7, stream=True)

QUICK: Sequence[Scenario] = (CLOSED, BUSY)
"""What ``make bench`` runs."""

FULL: Sequence[Scenario] = (
    CLOSED,
    Scenario(mix=Mix.UNIFORM),
    Scenario(mix=Mix.SIZES),
    *(Scenario(load=load) for load in (0.5, 0.7)),
    BUSY,
    Scenario(load=1.1),
    OVERLOAD,
    LEAVERS,
    Scenario(load=0.9, bursts=True),
    Scenario(mix=Mix.UNIFORM, load=0.9),
    Scenario(mix=Mix.SIZES, load=0.9),
    STREAMED,
)
"""What ``make bench-full`` runs: each closed loop before the loads that are shares of it."""

SCENARIOS: Mapping[str, Scenario] = {scenario.name: scenario for scenario in FULL}
