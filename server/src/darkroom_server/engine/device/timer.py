"""Times work on its device without waiting for the device."""

import time
from typing import Self

import torch


class Timer:
    """Times a ``with`` block and the work that it launches on ``device``.

    ``began`` is in ``time.monotonic`` seconds. On CUDA two events in the device's queue record when
    the block's work begins and ends there, so that the caller can launch more work meanwhile.
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

    def seconds(self) -> float:
        """Seconds until the block's work was done; call it after the device was synchronized."""
        launched = self._ended - self.began
        if self._events is None:
            return launched
        first, last = self._events
        return max(launched, float(first.elapsed_time(last)) / 1000)
