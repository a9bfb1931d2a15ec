"""How fast jobs leave, to tell a refused caller when to come back."""

from collections import deque

SHORTEST_SECONDS = 0.5
LONGEST_SECONDS = 10.0


class Pace:
    """Remembers when the last jobs left; times are ``time.monotonic`` seconds."""

    def __init__(self) -> None:
        self._left: deque[float] = deque(maxlen=16)

    def job_left(self, now: float) -> None:
        """Note that a place became free."""
        self._left.append(now)

    def retry_after(self, now: float) -> float:
        """Seconds until a place is likely to be free, between half a second and ten."""
        if not self._left:
            return 1.0
        mean = (now - self._left[0]) / len(self._left)
        return min(max(mean, SHORTEST_SECONDS), LONGEST_SECONDS)
