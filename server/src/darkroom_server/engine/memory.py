"""How much memory the device has, and how much a piece of work took at its peak."""

import ctypes
import re
import time
from collections.abc import Callable, Collection
from pathlib import Path

import psutil
import structlog
import torch

from darkroom_server.core.events import Event, MemoryReport

log = structlog.get_logger(__name__)

SAFETY_MARGIN = 0.1
"""Part of the free memory that is left alone: fragmentation, and what else uses the device."""


class PeakMemory:
    """Measures the peak between ``reset`` and ``read``, above what was in use before, in bytes.

    On CUDA it is the allocator's. On a CPU it is the process's resident set, by Linux's own
    high-water mark (proc(5), clear_refs), and so blind to memory that was in use before and is
    used again.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._base = 0

    def reset(self) -> None:
        """Begin a measurement."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._base = torch.cuda.memory_allocated(self._device)
        else:
            # What the C library keeps for later would hide the growth.
            ctypes.CDLL(None).malloc_trim(0)
            try:
                Path("/proc/self/clear_refs").write_text("5")
                self._base = _status_bytes("VmRSS")
            except OSError:
                # Some sandboxes lack it: only what goes beyond the highest mark so far is seen.
                log.warning("the peak of memory cannot be reset, measurements may be too low")
                self._base = _status_bytes("VmHWM")

    def read(self) -> int:
        """The peak since ``reset``, above the level at ``reset``."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return torch.cuda.max_memory_allocated(self._device) - self._base
        return max(0, _status_bytes("VmHWM") - self._base)


class MemoryReporter:
    """Tells the memory of ``devices`` as an event, about once a second while passes run."""

    INTERVAL_SECONDS = 1.0

    def __init__(self, devices: Collection[torch.device], emit: Callable[[Event], None]) -> None:
        self._devices = devices
        self._emit = emit
        self._next = 0.0

    def report(self) -> None:
        """Tell the memory, if the last time is long enough ago."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self.INTERVAL_SECONDS
        rss = _status_bytes("VmRSS")
        for device in self._devices:
            self._emit(
                MemoryReport(device=str(device), by_kind=_bytes_by_kind(device, rss), host_rss=rss)
            )


def _bytes_by_kind(device: torch.device, rss: int) -> dict[str, int]:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return {
            "allocated": torch.cuda.memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
            "peak": torch.cuda.max_memory_allocated(device),
            "device_used": total - free,
            "device_total": total,
        }
    system = psutil.virtual_memory()
    return {
        "allocated": rss,
        "reserved": rss,
        "peak": _status_bytes("VmHWM"),
        "device_used": system.total - system.available,
        "device_total": system.total,
    }


def available_bytes(device: torch.device) -> int:
    """What is free on the device, or to this process, less the safety margin."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int((free + unused) * (1 - SAFETY_MARGIN))
    free = psutil.virtual_memory().available
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free, int(text) - used)
    return int(free * (1 - SAFETY_MARGIN))


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
