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
    """Serve all ``arrivals`` on the caller's thread, at most ``max_images`` images per call.

    Each call takes the oldest waiting request and all waiting ones with the same settings that fit.
    A request for more images has a call of its own. ``generate`` returns when the images are
    encoded. With ``max_images`` 1, ``pipe()`` is called for one request after another.
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
        batch = _next_call(waiting, max_images)
        waiting = [each for each in waiting if each not in batch]
        generate([request for _, request in batch])
        now = clock.now()
        for at, request in batch:
            answers.append(Answer.of(request, at, now))
            arrivals.answered(now)


def _next_call(
    waiting: list[tuple[float, Request]], max_images: int
) -> list[tuple[float, Request]]:
    """The oldest of ``waiting``, and those of its settings that fit."""
    oldest, *others = waiting
    call, images = [oldest], oldest[1].images
    for each in others:
        if each[1].settings == oldest[1].settings and images + each[1].images <= max_images:
            call.append(each)
            images += each[1].images
    return call
