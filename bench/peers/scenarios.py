"""The loads that every peer gets."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from bench.workload.arrivals import Answer
from bench.workload.requests import (
    Request,
    bursts,
    mixed,
    poisson,
    sized,
    uniform,
    with_cancels,
    with_deadlines,
    with_images,
)

CALLERS = 8
"""Of a closed loop."""

UNIFORM = (30, 7.5)
"""Steps and guidance of requests that are all alike. Their images are as in ``IMAGES``."""

SIDES = (0.75, 1.0, 1.5)
"""Factors of the model's default size for mixed sizes."""

PATIENCE = 5.0
"""A deadline is this many times the lone latency, as in AlpaServe (OSDI 2023)."""

WITHIN = (2, 5, 10)
"""SLO attainment: the share of the requests that take at most 2, 5 or 10 times as long as alone."""

CANCELS = 0.2
"""Share of the requests that are cancelled."""

CANCEL_WITHIN = 4.0
"""They are cancelled within this many times their lone latency."""


class Mix(StrEnum):
    """Kinds of requests."""

    MIXED = "mixed"
    UNIFORM = "uniform"
    SIZES = "sizes"

    def text_of(self, answers: Sequence[Answer]) -> str:
        """For a heading; requests that are all alike were others in earlier versions."""
        if self is Mix.MIXED:
            return "mixed"
        if self is Mix.SIZES:
            return f"mixed, sizes too ({', '.join(f'{s:g}' for s in SIDES)} of the default)"
        text = f"all alike ({answers[0].steps} steps, guidance {UNIFORM[1]})"
        counts = Counter(each.images for each in answers)
        if set(counts) == {1}:
            return text
        shares = (f"{n} {count / len(answers):.0%}" for n, count in sorted(counts.items()))
        return f"{text}, images of a request: {', '.join(shares)}"


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
    def is_plain(self) -> bool:
        """Whether it is an open loop of Poisson arrivals, without anything besides."""
        besides = self.bursts, self.deadlines, self.cancels, self.stream
        return self.load is not None and not any(besides)

    @property
    def name(self) -> str:
        """For tables and the command line: "mixed closed", "mixed 0.9 bursts"."""
        kinds = [k for k in ("bursts", "deadlines", "cancels", "stream") if getattr(self, k)]
        if self.batch_timeout is not None:
            kinds.append(f"{self.batch_timeout * 1000:g} ms")
        return " ".join([self.mix, "closed" if self.load is None else f"{self.load:g}", *kinds])

    def has(self, answers: Sequence[Answer]) -> bool:
        """Whether these can be of its requests: in earlier versions UNIFORM had other steps."""
        return self.mix is not Mix.UNIFORM or {each.steps for each in answers} == {UNIFORM[0]}

    def rate(self, requests: Sequence[Request], capacity: float) -> float:
        """The mean number of ``requests`` per second at its load; ``capacity`` is in images/s."""
        images = sum(request.images for request in requests)
        return (self.load or 0.0) * capacity * len(requests) / images

    def requests(
        self, count: int, seed: int, capacity: float, nominal: float, side: int
    ) -> list[Request]:
        """``count`` requests of this scenario; equal arguments give equal requests.

        ``capacity`` is (a)'s in images/s, ``nominal`` the seconds of a step of a lone request,
        ``side`` the model's default side in pixels.
        """
        requests = mixed(count, seed)
        if self.mix is Mix.UNIFORM:
            requests = with_images(uniform(requests, *UNIFORM), seed)
        elif self.mix is Mix.SIZES:
            requests = sized(requests, tuple(round(side * share) for share in SIDES), seed)
        if self.load is not None:
            arrive = bursts if self.bursts else poisson
            requests = arrive(requests, self.rate(requests, capacity), seed)
        if self.deadlines:
            requests = with_deadlines(requests, PATIENCE * nominal)
        if self.cancels:
            requests = with_cancels(requests, CANCELS, CANCEL_WITHIN * nominal, seed)
        return requests


CLOSED = Scenario()
UNIFORM_CLOSED = Scenario(mix=Mix.UNIFORM)
SIZES_CLOSED = Scenario(mix=Mix.SIZES)
BUSY = Scenario(load=0.9)
SATURATED = Scenario(load=1.0)
OVERLOAD = Scenario(load=1.1, deadlines=True)
CANCELLED = Scenario(load=0.9, cancels=True)
STREAMED = Scenario(load=0.7, stream=True)

QUICK: Sequence[Scenario] = (CLOSED, UNIFORM_CLOSED, BUSY, SATURATED)
"""What ``make bench`` runs."""

FULL: Sequence[Scenario] = (
    CLOSED,
    UNIFORM_CLOSED,
    SIZES_CLOSED,
    *(Scenario(load=load) for load in (0.5, 0.7)),
    BUSY,
    SATURATED,
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
