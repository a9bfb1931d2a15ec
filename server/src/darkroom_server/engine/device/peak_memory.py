"""The memory that passes and decodes take, measured while they serve."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from darkroom_server.core.events import Event, PeakMeasured
from darkroom_server.core.metric_labels import rows_class, size_class
from darkroom_server.engine.device.memory import PeakMemory

INTERVAL_SECONDS = {"cuda": 1.0, "cpu": 60.0}
"""Reading the allocator's statistics takes longer than all other metrics of a step together; on a
CPU the C library must even give back what it keeps, which takes longer than a small pass."""

Key = tuple[str, str, str]


class PeakMemoryTracker:
    """Measures the work of the loop's thread, and tells of each new height.

    Each class of work is measured once in ``INTERVAL_SECONDS``.
    """

    def __init__(self, emit: Callable[[Event], None]) -> None:
        self._emit = emit
        self._told: dict[Key, int] = {}
        self._next: dict[Key, float] = {}
        self._memories: dict[torch.device, PeakMemory] = {}

    @property
    def highest(self) -> int:
        """The most that was in use at once, in bytes; may be asked by any thread."""
        return max((memory.highest for memory in tuple(self._memories.values())), default=0)

    @contextmanager
    def watch(
        self, device: torch.device, model: str, width: int, height: int, rows: int = 0
    ) -> Iterator[None]:
        """Measure what the block takes: a pass of ``rows`` rows, or a decode.

        Nothing is told of a block that raises.
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
        if peak > self._told.get(key, -1):
            self._told[key] = peak
            self._emit(
                PeakMeasured(model=model, width=width, height=height, rows=rows, peak_bytes=peak)
            )

    def _due(self, device: torch.device, key: Key) -> bool:
        now = time.monotonic()
        if now < self._next.get(key, 0.0):
            return False
        self._next[key] = now + INTERVAL_SECONDS[device.type]
        return True
