"""How much memory the device has, and how much a piece of work took at its peak."""

import ctypes
import re
from pathlib import Path

import psutil
import structlog
import torch

from darkroom_server.engine.device import cgroup

log = structlog.get_logger(__name__)

SAFETY_MARGIN = 0.1
"""Part of the free memory that is left alone: fragmentation, and what else uses the device."""


class PeakMemory:
    """Measures the peak between ``reset`` and ``read``, above what was in use before, in bytes.

    On CUDA it is the allocator's. On a CPU it is the process's resident set, by Linux's own
    high-water mark (proc(5), clear_refs), and so blind to memory that was in use before and is
    used again. ``exact`` turns False where Linux does not let the mark be reset. ``highest`` is
    the most that was in use at once since the first reset, or shortly before it.
    """

    def __init__(self, device: torch.device) -> None:
        self.exact = True
        self.highest = 0
        self._device = device
        self._base = 0

    def reset(self) -> bool:
        """Begin a measurement; returns ``exact``."""
        self.highest = max(self.highest, self._peak())
        if self._device.type == "cuda":
            # No waiting for the device: the allocator works, and counts, as work is launched.
            torch.cuda.reset_peak_memory_stats(self._device)
            self._base = torch.cuda.memory_allocated(self._device)
        else:
            # What the C library keeps for later would hide the growth.
            ctypes.CDLL(None).malloc_trim(0)
            try:
                Path("/proc/self/clear_refs").write_text("5")
                self._base = status_bytes("VmRSS")
            except OSError:
                self.exact = False
                # Some sandboxes lack it: only what goes beyond the highest mark so far is seen.
                log.warning("the peak of memory cannot be reset, measurements may be too low")
                self._base = status_bytes("VmHWM")
        return self.exact

    def read(self) -> int:
        """The peak since ``reset``, above the level at ``reset``."""
        peak = self._peak()
        self.highest = max(self.highest, peak)
        return max(0, peak - self._base)

    def _peak(self) -> int:
        """What torch, or Linux, has marked since the last reset by whomever."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        return status_bytes("VmHWM")


def available_bytes(device: torch.device) -> int:
    """What is free on the device, or to this process, less the safety margin."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int((free + unused) * (1 - SAFETY_MARGIN))
    free = psutil.virtual_memory().available
    left = cgroup.free_memory()
    return int((free if left is None else min(free, left)) * (1 - SAFETY_MARGIN))


def status_bytes(field: str) -> int:
    """A size that Linux tells of this process, such as "VmRSS", in bytes; 0 if it does not."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
