"""The loads that every peer gets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from bench.workload.requests import (
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
"""Steps and guidance of requests that are all alike."""

SIDES = (0.75, 1.0, 1.5)
"""Factors of the model's default size for mixed sizes."""

PATIENCE = 5.0
"""A deadline is this many times the lone latency, as in AlpaServe (OSDI 2023)."""

CANCELS = 0.2
"""Share of the requests that are cancelled."""

CANCEL_WITHIN = 4.0
"""They are cancelled within this many times their lone latency."""


class Mix(StrEnum):
    """Kinds of requests."""

    MIXED = "mixed"
    UNIFORM = "uniform"
    SIZES = "sizes"

    @property
    def text(self) -> str:
        """For a heading."""
        steps, guidance = UNIFORM
        return {
            Mix.MIXED: "mixed",
            Mix.UNIFORM: f"all alike ({steps} steps, guidance {guidance})",
            Mix.SIZES: f"mixed, sizes too ({', '.join(f'{s:g}' for s in SIDES)} of the default)",
        }[self]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """``load`` is a share of (a)'s capacity for this mix, None in the closed loop.

    ``stream``: with progress, for Darkroom alone. ``batch_timeout``: in seconds, only for peers
    that batch; None is the best one of the peer.
    """

    mix: Mix = Mix.MIXED
    load: float | None = None
    bursts: bool = False
    deadlines: bool = False
    cancels: bool = False
    stream: bool = False
    batch_timeout: float | None = None

    @property
    def name(self) -> str:
        """For tables and the command line: "mixed closed", "mixed 0.9 bursts"."""
        kinds = [k for k in ("bursts", "deadlines", "cancels", "stream") if getattr(self, k)]
        if self.batch_timeout is not None:
            kinds.append(f"{self.batch_timeout * 1000:g} ms")
        return " ".join([self.mix, "closed" if self.load is None else f"{self.load:g}", *kinds])

    def requests(
        self, count: int, seed: int, capacity: float, nominal: float, side: int
    ) -> list[Request]:
        """``count`` requests of this scenario; equal arguments give equal requests.

        ``capacity`` is (a)'s in images/s, ``nominal`` the seconds of a step of a lone request,
        ``side`` the model's default side in pixels.
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
            requests = with_cancels(requests, CANCELS, CANCEL_WITHIN * nominal, seed)
        return requests


CLOSED = Scenario()
BUSY = Scenario(load=0.9)
OVERLOAD = Scenario(load=1.1, deadlines=True)
CANCELLED = Scenario(load=0.9, cancels=True)
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
    CANCELLED,
    Scenario(load=0.9, bursts=True),
    Scenario(mix=Mix.UNIFORM, load=0.9),
    Scenario(mix=Mix.SIZES, load=0.9),
    STREAMED,
)
"""What ``make bench-full`` runs; each closed loop precedes the loads that are shares of it."""

SCENARIOS: Mapping[str, Scenario] = {scenario.name: scenario for scenario in FULL}
