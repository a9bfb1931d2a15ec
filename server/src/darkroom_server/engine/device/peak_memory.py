"""Peak memory of batches and decodes, measured while serving."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from darkroom_server.core.events import Event, PeakMeasured
from darkroom_server.core.metric_labels import rows_class, size_class
from darkroom_server.engine.device.memory import PeakMemory

INTERVAL_SECONDS = {"cuda": 1.0, "cpu": 60.0}
"""Reading the allocator's statistics takes longer than all other metrics of a step together. On a
CPU the C library must first return its free memory, which takes longer than a small batch."""

Key = tuple[str, str, str]


class PeakMemoryTracker:
    """Measures the work of the loop's thread, and emits each new maximum.

    Each class of work (model, image size, rows) is measured once in ``INTERVAL_SECONDS``.
    """

    def __init__(self, emit: Callable[[Event], None]) -> None:
        self._emit = emit
        self._emitted: dict[Key, int] = {}
        self._next: dict[Key, float] = {}
        self._memories: dict[torch.device, PeakMemory] = {}

    @property
    def highest(self) -> int:
        """The most bytes that were in use at once; any thread may read it."""
        return max((memory.highest for memory in tuple(self._memories.values())), default=0)

    @contextmanager
    def watch(
        self, device: torch.device, model: str, width: int, height: int, rows: int = 0
    ) -> Iterator[None]:
        """Measure the block's memory: a batch of ``rows`` rows, or a decode (0 rows).

        Emits nothing if the block raises.
        """
        memory = self._memories.setdefault(device, PeakMemory(device))
        key = (model, size_class(width, height), rows_class(rows) if rows else "")
        if not memory.exact or not self._due(device, key):
            yield
            return
        can_measure = memory.reset()
        yield
        if not can_measure:
            return
        peak = memory.read()
        if peak > self._emitted.get(key, -1):
            self._emitted[key] = peak
            self._emit(
                PeakMeasured(model=model, width=width, height=height, rows=rows, peak_bytes=peak)
            )

    def _due(self, device: torch.device, key: Key) -> bool:
        now = time.monotonic()
        if now < self._next.get(key, 0.0):
            return False
        self._next[key] = now + INTERVAL_SECONDS[device.type]
        return True
