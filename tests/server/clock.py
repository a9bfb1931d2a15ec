"""Time that a test lets pass, so that none depends on how fast the machine is."""

import time

import pytest


class Clock:
    """``time.monotonic``, and with it the timers of asyncio's loops, some way ahead, or stopped."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._ahead = 0.0
        self._real = time.monotonic
        self._stopped: float | None = None
        patch.setattr(time, "monotonic", self._now)

    def skip(self, seconds: float) -> None:
        """Let so many seconds pass; timers that are due ring when the loop turns next."""
        self._ahead += seconds

    def stop(self) -> None:
        """Let no time pass but what ``skip`` does; timeouts stop too."""
        self._stopped = self._real()

    def _now(self) -> float:
        return (self._real() if self._stopped is None else self._stopped) + self._ahead
