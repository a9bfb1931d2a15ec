"""Available memory of a device, and the peak of a piece of work."""

import ctypes
import re
from pathlib import Path
from typing import Any

import psutil
import structlog
import torch

from darkroom_server.engine.device import cgroup

log = structlog.get_logger(__name__)

SAFETY_MARGIN = 0.1
"""Part of the free memory that is not used, for fragmentation and other users of the device."""


USUAL_POOL = (0, 0)
"""The id of the pool of memory from which torch takes what no graph uses."""


class PeakMemory:
    """Measures the peak between ``reset`` and ``read``, above what was in use before, in bytes.

    On CUDA it is the allocator's peak. On a CPU it is the high-water mark of the resident set
    (proc(5), clear_refs), which does not see memory that was in use before and is used again.
    ``exact`` becomes False if Linux does not allow to reset the mark. ``highest`` is the most that
    was in use at once since the first reset, or shortly before it.
    """

    def __init__(self, device: torch.device) -> None:
        self.exact = True
        self.highest = 0
        self._device = device
        self._base = 0

    def reset(self) -> bool:
        """Start a measurement; returns ``exact``."""
        self.highest = max(self.highest, self._peak())
        if self._device.type == "cuda":
            # No synchronization: the allocator counts when work is launched.
            torch.cuda.reset_peak_memory_stats(self._device)
            self._base = torch.cuda.memory_allocated(self._device)
        else:
            # Free memory that the C library keeps would hide the growth.
            ctypes.CDLL(None).malloc_trim(0)
            try:
                Path("/proc/self/clear_refs").write_text("5")
                self._base = status_bytes("VmRSS")
            except OSError:
                self.exact = False
                # Some sandboxes forbid it: then only growth beyond the highest mark is seen.
                log.warning("peak memory cannot be reset, measurements may be too low")
                self._base = status_bytes("VmHWM")
        return self.exact

    def read(self) -> int:
        """The peak since ``reset``, above the level at ``reset``."""
        peak = self._peak()
        self.highest = max(self.highest, peak)
        return max(0, peak - self._base)

    def _peak(self) -> int:
        """The peak that torch, or Linux, recorded since the last reset by any caller."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        return status_bytes("VmHWM")


def available_bytes(device: torch.device) -> int:
    """Bytes that are free on the device, or for this process, less the safety margin."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int((free + _unused_bytes(device)) * (1 - SAFETY_MARGIN))
    free = psutil.virtual_memory().available
    below_limit = cgroup.free_memory()
    if below_limit is not None:
        free = min(free, below_limit)
    return int(free * (1 - SAFETY_MARGIN))


def _unused_bytes(device: torch.device) -> int:
    """Bytes that torch has of the GPU, and that the next batch can use.

    What is free in the pool of graphs is not among them: only graphs use it.
    """
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in _segments(device)
        if tuple(segment["segment_pool_id"]) == USUAL_POOL
    )


def graph_pool_bytes(device: torch.device) -> int:
    """Bytes that torch has of ``device`` for graphs; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    return sum(
        segment["total_size"]
        for segment in _segments(device)
        if tuple(segment["segment_pool_id"]) != USUAL_POOL
    )


def _segments(device: torch.device) -> list[Any]:
    """What torch has of a GPU."""
    index = device.index or 0  # "cuda" is the first one.
    return [each for each in torch.cuda.memory_snapshot() if each["device"] == index]


def status_bytes(field: str) -> int:
    """A size in /proc/self/status, such as "VmRSS", in bytes; 0 if it is not there."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
