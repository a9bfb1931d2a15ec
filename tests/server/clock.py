"""Time that a test lets pass, so that none depends on how fast the machine is."""

import time

import pytest


class Clock:
    """``time.monotonic``, and with it the timers of asyncio's loops, some way ahead."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._ahead = 0.0
        real = time.monotonic
        patch.setattr(time, "monotonic", lambda: real() + self._ahead)

    def skip(self, seconds: float) -> None:
        """Let so many seconds pass; timers that are due ring when the loop turns next."""
        self._ahead += seconds
