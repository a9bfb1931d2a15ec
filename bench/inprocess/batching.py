"""Static batching around ``pipe()``: one call for waiting requests with equal settings."""

from collections.abc import Callable
from typing import Protocol

from bench.workload.arrivals import Answer, Arrivals
from bench.workload.requests import Request


class Clock(Protocol):
    """Seconds since the start of a run."""

    def now(self) -> float:
        """The time."""

    def wait_until(self, moment: float) -> None:
        """Return at ``moment``."""


def serve_batches(
    arrivals: Arrivals, clock: Clock, generate: Callable[[list[Request]], None], max_images: int
) -> list[Answer]:
    """Serve all ``arrivals`` on the caller's thread, at most ``max_images`` requests per call.

    Each call takes the oldest waiting request and all waiting ones with the same settings.
    ``generate`` returns when their images are encoded. With ``max_images`` 1, ``pipe()`` is called
    for one request after another.
    """
    waiting: list[tuple[float, Request]] = []
    answers: list[Answer] = []
    while True:
        waiting += arrivals.until(clock.now())
        if not waiting:
            moment = arrivals.next_at()
            if moment is None:
                return answers
            clock.wait_until(moment)
            continue
        settings = waiting[0][1].settings
        batch = [each for each in waiting if each[1].settings == settings][:max_images]
        waiting = [each for each in waiting if each not in batch]
        generate([request for _, request in batch])
        now = clock.now()
        for at, request in batch:
            answers.append(Answer.of(request, at, now))
            arrivals.answered(now)
