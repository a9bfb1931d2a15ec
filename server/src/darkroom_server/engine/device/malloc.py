"""What the C library does with the memory that passes give back."""

import ctypes

# mallopt(3), malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3

KEPT_BYTES = 256 * 2**20
"""Free memory at the heap's end that stays with the process."""

LARGEST_BYTES = 32 * 2**20
"""What is larger is mapped for itself each time; the most that glibc allows."""


def keep_freed_memory() -> None:
    """Keep what a pass gives back for the next one, for the life of this process.

    Else glibc returns it to Linux, which clears every page anew: thousands of faults a pass on a
    CPU. A C library other than glibc keeps its own ways.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    # Both: a threshold that is set ends glibc's own search for the other.
    mallopt(M_MMAP_THRESHOLD, LARGEST_BYTES)
    mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
