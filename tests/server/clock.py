"""A clock that a test controls, so that no test depends on the speed of the machine."""

import time

import pytest


class Clock:
    """Replaces ``time.monotonic``, and with it asyncio's timers: moved ahead, or stopped."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._ahead = 0.0
        self._real = time.monotonic
        self._stopped: float | None = None
        patch.setattr(time, "monotonic", self._now)

    def skip(self, seconds: float) -> None:
        """Move ahead by ``seconds``; due timers run in the next iteration of the event loop."""
        self._ahead += seconds

    def stop(self) -> None:
        """Stop the clock: only ``skip`` moves it. Timeouts stop too."""
        self._stopped = self._real()

    def _now(self) -> float:
        return (self._real() if self._stopped is None else self._stopped) + self._ahead
