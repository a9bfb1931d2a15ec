"""Files that are read again when they change, while the server runs."""

import os
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import structlog

from darkroom_server.core.errors import StartupError

log = structlog.get_logger(__name__)

T = TypeVar("T")
Stamp = tuple[tuple[int, int, int, int] | None, ...]


class ReloadingFile(Generic[T]):
    """What ``read`` makes of the files at ``paths``: read now, and again once one has changed.

    ``read`` raises ``StartupError`` where they make no sense; the constructor lets it pass, and
    ``current`` logs it and keeps what was good before. May be used from any thread.
    """

    def __init__(self, what: str, paths: Sequence[str], read: Callable[[], T]) -> None:
        self._what = what
        self._paths = paths
        self._read = read
        self._lock = threading.Lock()
        # Before reading: what is written meanwhile is read again.
        self._stamp = self._stamp_now()
        self._value = read()

    def current(self) -> T:
        """What the files say now, or said when they last made sense; costs one ``stat`` each."""
        with self._lock:
            stamp = self._stamp_now()
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self._value = self._read()
                    log.info("reread", what=self._what)
                except StartupError as error:
                    log.error("reread failed, the old ones stay", what=self._what, why=str(error))
            return self._value

    def _stamp_now(self) -> Stamp:
        return tuple(map(_stamp, self._paths))


def _stamp(path: str) -> tuple[int, int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    # The time of change too: a file that could not be read is given to the server by chown.
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino
