"""Times work on its device without waiting for the device."""

import time
from typing import Self

import torch


class Timer:
    """Times a ``with`` block and the work that it launches on ``device``.

    ``began`` is in ``time.monotonic`` seconds. On CUDA two events in the device's queue record when
    the block's work begins and ends there, so that the caller can launch more work meanwhile. The
    first is recorded after the work that was launched before, so that work does not count.
    """

    def __init__(self, device: torch.device) -> None:
        self.began = 0.0
        self._ended = 0.0
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._events = first, last

    def __enter__(self) -> Self:
        self.began = time.monotonic()
        if self._events is not None:
            self._events[0].record()
        return self

    def __exit__(self, *_: object) -> None:
        if self._events is not None:
            self._events[1].record()
        self._ended = time.monotonic()

    @property
    def runs_ahead(self) -> bool:
        """Whether the block may end before its work does."""
        return self._events is not None

    def wait(self) -> float:
        """Wait until the block's work is done; returns the ``time.monotonic`` seconds of its end.

        A caller that comes late gets the time at which it came.
        """
        if self._events is None:
            return self._ended
        last = self._events[1]
        if not last.query():
            last.synchronize()
        return time.monotonic()

    def seconds(self) -> float:
        """Seconds that the block's work took; waits until it is done."""
        if self._events is None:
            return self._ended - self.began
        self.wait()
        first, last = self._events
        return float(first.elapsed_time(last)) / 1000
