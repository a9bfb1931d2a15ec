"""Errors of a machine that has no descriptors, processes, threads or memory to give now."""

import errno

EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM})

NO_THREAD = "can't start new thread"
"""The text of Python's ``RuntimeError`` if the kernel creates no thread (EAGAIN)."""


def is_exhaustion(error: BaseException | None) -> bool:
    """Whether ``error``, or one that caused it, says so: the same attempt may succeed later."""
    while error is not None:
        match error:
            case MemoryError():
                return True
            case OSError(errno=number) if number in EXHAUSTED:
                return True
            case RuntimeError() if NO_THREAD in str(error):
                return True
        error = error.__cause__ or error.__context__
    return False
