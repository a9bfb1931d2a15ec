"""Deadlines of many jobs on one timer."""

import asyncio
import heapq
from collections.abc import Callable


class Deadlines:
    """Calls ``expired`` with each id whose deadline has passed, from the event loop.

    Deadlines are ``time.monotonic`` seconds, the clock of asyncio's loops.
    """

    def __init__(self, expired: Callable[[str], None]) -> None:
        self._expired = expired
        self._heap: list[tuple[float, str]] = []
        self._live: dict[str, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, id: str, deadline: float) -> None:
        """Watch ``id``."""
        self._live[id] = deadline
        heapq.heappush(self._heap, (deadline, id))
        self._arm()

    def discard(self, id: str) -> None:
        """Stop watching ``id``."""
        if self._live.pop(id, None) is not None:
            self._arm()

    def close(self) -> None:
        """Stop watching."""
        self._live.clear()
        self._arm()

    def _arm(self) -> None:
        while self._heap and self._live.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        when = self._heap[0][0] if self._heap else None
        if self._timer is not None:
            if self._timer.when() == when and not self._timer.cancelled():
                return
            self._timer.cancel()
            self._timer = None
        if when is not None:
            self._timer = asyncio.get_running_loop().call_at(when, self._expire_due)

    def _expire_due(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        while self._heap and self._heap[0][0] <= now:
            deadline, id = heapq.heappop(self._heap)
            if self._live.get(id) == deadline:
                del self._live[id]
                self._expired(id)
        self._arm()
