"""Uploaded files by digest, within limits of bytes and time."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from darkroom_server.core.errors import QuotaExceeded, TooLarge

RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """One stored file; ``width`` and ``height`` of the picture in pixels, as it is seen."""

    data: bytes
    width: int
    height: int


@dataclass(slots=True)
class _Entry:
    upload: Upload
    used_at: float


class UploadStore:
    """Keeps files for their owners; an owner never sees another one's.

    All files together take at most ``max_bytes``, those of one owner at most ``max_owner_bytes``.
    The least recently used file is evicted: of an owner above its share, else of the owner that
    uses the most. A file expires ``ttl`` seconds after its last use. ``evicted`` counts evictions
    and expirations.
    """

    def __init__(self, *, max_bytes: int, max_owner_bytes: int, ttl: float) -> None:
        self.ttl = ttl
        self.evicted = 0
        self._max_bytes = max_bytes
        self._max_owner_bytes = min(max_owner_bytes, max_bytes)
        self._entries: dict[str, dict[str, _Entry]] = {}
        """By owner and digest, the least recently used first."""
        self._sizes: Counter[str] = Counter()
        self._receiving: Counter[str] = Counter()

    @property
    def stored_bytes(self) -> int:
        """The bytes of all stored files."""
        return self._sizes.total()

    def get(self, owner: str, digest: str) -> Upload | None:
        """The file of that digest, if ``owner`` has uploaded it and it is still there."""
        self._remove_expired()
        entries = self._entries.get(owner, {})
        entry = entries.pop(digest, None)
        if entry is None:
            return None
        entry.used_at = time.monotonic()
        entries[digest] = entry
        return entry.upload

    def put(self, owner: str, digest: str, upload: Upload) -> None:
        """Store a file, and evict others to make room."""
        self._remove_expired()
        self._remove(owner, digest)
        self._entries.setdefault(owner, {})[digest] = _Entry(upload, time.monotonic())
        self._sizes[owner] += len(upload.data)
        while self._sizes[owner] > self._max_owner_bytes:
            self._evict(owner)
        while self.stored_bytes > self._max_bytes:
            self._evict(max(self._sizes, key=lambda each: (self._sizes[each], each == owner)))

    @contextmanager
    def receiving(self, owner: str) -> Iterator[Callable[[int], None]]:
        """Count the bytes of a file while it arrives; call the result with each part's size.

        It raises ``TooLarge`` for a file that the owner may never store, and ``QuotaExceeded`` if
        too much arrives at once.
        """
        received = 0

        def count(size: int) -> None:
            nonlocal received
            if received + size > self._max_owner_bytes:
                raise TooLarge(
                    f"the server stores {self._max_owner_bytes} bytes for one caller, and this "
                    "file has more",
                    metadata={"available_bytes": str(self._max_owner_bytes)},
                )
            if self._receiving[owner] + size > self._max_owner_bytes:
                raise QuotaExceeded(
                    f"caller:{owner}",
                    f"uploads of {owner!r} arrive with more than {self._max_owner_bytes} bytes "
                    "together; send fewer at a time",
                    RETRY_SECONDS,
                )
            if self._receiving.total() + size > self._max_bytes:
                raise QuotaExceeded(
                    "uploads",
                    f"uploads arrive with more than {self._max_bytes} bytes together; try again "
                    "later",
                    RETRY_SECONDS,
                )
            received += size
            self._receiving[owner] += size

        try:
            yield count
        finally:
            self._receiving[owner] -= received
            if not self._receiving[owner]:
                del self._receiving[owner]

    def _evict(self, owner: str) -> None:
        self._remove(owner, next(iter(self._entries[owner])))
        self.evicted += 1

    def _remove_expired(self) -> None:
        before = time.monotonic() - self.ttl
        for owner, entries in list(self._entries.items()):
            for digest, entry in list(entries.items()):
                if entry.used_at > before:
                    break
                self._remove(owner, digest)
                self.evicted += 1

    def _remove(self, owner: str, digest: str) -> None:
        entries = self._entries.get(owner, {})
        entry = entries.pop(digest, None)
        if entry is not None:
            self._sizes[owner] -= len(entry.upload.data)
            if not entries:
                del self._entries[owner], self._sizes[owner]
