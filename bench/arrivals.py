"""When requests come: by a schedule, or each as soon as a caller has its last image."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from bench.workload import Request


class Outcome(StrEnum):
    """How a request ended: with an image, or how else."""

    IMAGE = "image"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    REFUSED = "refused"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Drawn:
    """A finished request; ``arrival`` and ``latency`` are seconds, the former since the start.

    The latency counts from the scheduled arrival, so that what a busy contender keeps waiting
    before it looks is counted too (no coordinated omission). Where the outcome is no image, it
    says when the caller knew. ``first_progress`` counts likewise, None where nobody told.
    """

    index: int
    steps: int
    arrival: float
    latency: float
    outcome: Outcome = Outcome.IMAGE
    deadline: float | None = None
    first_progress: float | None = None

    @classmethod
    def of(cls, request: Request, arrival: float, now: float) -> Self:
        """``request``, whose image is there ``now``."""
        return cls(request.index, request.steps, arrival, now - arrival)


class Arrivals:
    """Requests in the order in which they come; times are seconds since the start of the run.

    ``callers`` is None for an open loop, where each comes at its ``arrival``. In a closed loop so
    many callers have one request each under way, and ask for the next one when they get an image.
    """

    def __init__(self, requests: Sequence[Request], callers: int | None = None) -> None:
        self._unasked: list[Request] = []
        self._due = [(request.arrival, request.index, request) for request in requests]
        if callers is not None:
            self._due = [(0.0, request.index, request) for request in requests[:callers]]
            self._unasked = list(requests[callers:])[::-1]
        heapq.heapify(self._due)
        self.count = len(requests)

    def until(self, now: float) -> list[tuple[float, Request]]:
        """Those that came since the last time, each with its moment."""
        came = []
        while self._due and self._due[0][0] <= now:
            at, _, request = heapq.heappop(self._due)
            came.append((at, request))
        return came

    def next_at(self) -> float | None:
        """When the next one comes, None where none is on its way."""
        return self._due[0][0] if self._due else None

    def answered(self, now: float) -> None:
        """A caller has its image, and asks for the next one if this is a closed loop."""
        if self._unasked:
            request = self._unasked.pop()
            heapq.heappush(self._due, (now, request.index, request))
