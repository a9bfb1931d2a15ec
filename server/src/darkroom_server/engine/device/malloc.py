"""The C library's handling of memory that batches free."""

import ctypes

# mallopt(3), malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3

KEPT_BYTES = 256 * 2**20
"""Free memory at the heap's end that the process keeps."""

LARGEST_BYTES = 32 * 2**20
"""Larger blocks get a mapping of their own each time; the most that glibc allows."""


def keep_freed_memory() -> None:
    """Keep the memory that a batch frees for the next one, until this process ends.

    By default glibc returns it to Linux, which clears every page again: thousands of page faults a
    batch on a CPU. Does nothing with a C library other than glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    # Both: if one is set, glibc stops adjusting the other.
    mallopt(M_MMAP_THRESHOLD, LARGEST_BYTES)
    mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def return_freed_memory() -> None:
    """Return what is kept to Linux now: another model may need it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
