"""What servers do around ``pipe()``: one call for requests that wait with equal settings."""

from collections.abc import Callable
from typing import Protocol

from bench.arrivals import Arrivals, Drawn
from bench.workload import Request


class Clock(Protocol):
    """Seconds since the start of a run, of this world or of a simulated one."""

    def now(self) -> float:
        """The time."""

    def wait_until(self, moment: float) -> None:
        """Let time pass."""


def serve(
    arrivals: Arrivals, clock: Clock, draw: Callable[[list[Request]], None], most: int
) -> list[Drawn]:
    """Serve all ``arrivals`` on the caller's thread, at most ``most`` requests to a call.

    Whenever it is free, it takes the oldest waiting request and all that wait with the same
    settings. ``draw`` returns once their images are encoded. With ``most`` 1 that is one call of
    ``pipe()`` after another.
    """
    waiting: list[tuple[float, Request]] = []
    drawn: list[Drawn] = []
    while True:
        waiting += arrivals.until(clock.now())
        if not waiting:
            moment = arrivals.next_at()
            if moment is None:
                return drawn
            clock.wait_until(moment)
            continue
        settings = waiting[0][1].settings
        batch = [each for each in waiting if each[1].settings == settings][:most]
        waiting = [each for each in waiting if each not in batch]
        draw([request for _, request in batch])
        now = clock.now()
        for at, request in batch:
            drawn.append(Drawn.of(request, at, now))
            arrivals.answered(now)
