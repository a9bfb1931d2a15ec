"""When requests arrive: by a schedule, or in a closed loop of callers."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from bench.workload.requests import Request


class Outcome(StrEnum):
    """How a request ended."""

    IMAGE = "image"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    REJECTED = "rejected"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Answer:
    """A request that has ended; times are seconds.

    ``arrival`` counts from the start of the run. ``latency`` and ``first_progress`` count from the
    scheduled arrival, so the time that a busy server does not read requests is included (no
    coordinated omission), until the last of its ``images``. Without them, ``latency`` lasts until
    the caller received the outcome. ``first_progress`` is None if no progress was reported.
    """

    index: int
    steps: int
    arrival: float
    latency: float
    outcome: Outcome = Outcome.IMAGE
    deadline: float | None = None
    first_progress: float | None = None
    images: int = 1

    @classmethod
    def of(cls, request: Request, arrival: float, now: float) -> Self:
        """``request``, whose images are ready at ``now``."""
        seconds = now - arrival
        return cls(request.index, request.steps, arrival, seconds, images=request.images)


class Arrivals:
    """Requests in the order of their arrival; times are seconds since the start of the run.

    Without ``callers`` the loop is open: each request arrives at its ``arrival``. With ``callers``
    it is closed: that many callers have one request in flight each, and send the next one when
    they receive its images.
    """

    def __init__(self, requests: Sequence[Request], callers: int | None = None) -> None:
        self._unsent: list[Request] = []
        self._due = [(request.arrival, request.index, request) for request in requests]
        if callers is not None:
            self._due = [(0.0, request.index, request) for request in requests[:callers]]
            self._unsent = list(requests[callers:])[::-1]
        heapq.heapify(self._due)
        self.count = len(requests)

    def until(self, now: float) -> list[tuple[float, Request]]:
        """The requests that arrived since the previous call, each with its moment."""
        arrived = []
        while self._due and self._due[0][0] <= now:
            at, _, request = heapq.heappop(self._due)
            arrived.append((at, request))
        return arrived

    def next_at(self) -> float | None:
        """The moment of the next arrival, None if no request is due."""
        return self._due[0][0] if self._due else None

    def answered(self, now: float) -> None:
        """A caller received its images; in a closed loop it sends the next request."""
        if self._unsent:
            request = self._unsent.pop()
            heapq.heappush(self._due, (now, request.index, request))
