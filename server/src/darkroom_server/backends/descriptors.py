"""File descriptors: a high limit for connections, and a reserve for starting an engine."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

MOST = 65_536
"""The limit to ask for; some systems allow a billion, and programs close each of them at start."""

RESERVE = 64
"""Descriptors that only an engine's start may use: it needs nine at once."""


def raise_descriptor_limit() -> int:
    """Raise the soft limit as far as the system allows, less the reserve; returns the new limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    possible = MOST if hard == resource.RLIM_INFINITY else min(hard, max(soft, MOST))
    limit = max(possible - RESERVE, possible // 2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit


@contextmanager
def reserved_descriptors() -> Iterator[None]:
    """Allow the block to use the reserve as well.

    The kernel checks the limit only when a descriptor is opened, so the block may keep what it
    opens. The limit belongs to the process: until the block ends, other threads can use the
    reserve too.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = soft + RESERVE if hard == resource.RLIM_INFINITY else min(soft + RESERVE, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
