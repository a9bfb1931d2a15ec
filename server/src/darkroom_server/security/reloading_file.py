"""Reloads files that change while the server runs."""

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
    """The result of ``read``, which reads the files at ``paths``; reloaded when one changes.

    ``read`` raises ``StartupError`` for invalid files. The constructor raises it too; ``current``
    logs it and keeps the last valid value. ``what`` names the files in the log. Thread-safe.
    """

    def __init__(self, what: str, paths: Sequence[str], read: Callable[[], T]) -> None:
        self._what = what
        self._paths = paths
        self._read = read
        self._lock = threading.Lock()
        # Before the read: a change during the read then causes another one.
        self._stamp = self._stamp_now()
        self._value = read()

    def current(self) -> T:
        """Return the value of the newest valid files; costs one ``stat`` per file."""
        with self._lock:
            stamp = self._stamp_now()
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self._value = self._read()
                    log.info("reread", what=self._what)
                except StartupError as error:
                    log.error(
                        "reread failed, keeping the old ones", what=self._what, why=str(error)
                    )
            return self._value

    def _stamp_now(self) -> Stamp:
        return tuple(map(_stamp, self._paths))


def _stamp(path: str) -> tuple[int, int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    # ctime too: `chown` makes an unreadable file readable without changing mtime.
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino
