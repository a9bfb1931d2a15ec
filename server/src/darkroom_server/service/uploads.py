"""Receiving a picture that later requests may name."""

import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from darkroom_server.core.errors import (
    DarkroomError,
    InvalidRequest,
    QuotaExceeded,
    Refused,
    Violation,
)
from darkroom_server.dispatch import counted_as, quota_subject
from darkroom_server.service.call_context import CallContext
from darkroom_server.uploads.decoder_pool import DecoderPool, Fit
from darkroom_server.uploads.fit import Bounds
from darkroom_server.uploads.store import Upload, UploadStore

MAX_CHUNK_BYTES = 512 * 1024
MAX_UPLOADS_PER_CALLER = 16
"""That one caller sends at once."""

RETRY_SECONDS = 1.0

ANY_SIZE = Fit(kind="check", bounds=Bounds(least=1, most=1, multiple=1))


class UploadOutcome(StrEnum):
    """How an upload ended. KNOWN: the server had the file already."""

    STORED = "stored"
    KNOWN = "known"
    INVALID = "invalid"
    REFUSED = "refused"
    FAILED = "failed"
    CANCELLED = "cancelled"


class UploadObserver(Protocol):
    """Receives the end of each upload, on the event loop."""

    def upload_ended(self, outcome: UploadOutcome, received_bytes: int) -> None:
        """Record it, without blocking and without raising."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredUpload:
    """A picture that its caller can name; sizes in pixels, ``expires_in`` in seconds."""

    upload_id: str
    width: int
    height: int
    expires_in: float


class UploadService:
    """Receives, checks and stores pictures."""

    def __init__(self, store: UploadStore, decoder: DecoderPool, observer: UploadObserver) -> None:
        self._store = store
        self._decoder = decoder
        self._observer = observer
        self._open: Counter[str] = Counter()

    async def receive(self, call: CallContext, chunks: AsyncIterator[bytes]) -> StoredUpload:
        """Store the picture whose file ``chunks`` are.

        Raises ``InvalidRequest``, ``TooLarge``, ``QuotaExceeded``, ``QueueFull`` and
        ``GenerationFailed``.
        """
        owner = counted_as(call.caller)
        received = bytearray()
        outcome = UploadOutcome.CANCELLED
        try:
            with self._place(call), self._store.receiving(owner) as count:
                async for chunk in chunks:
                    if len(chunk) > MAX_CHUNK_BYTES:
                        says = f"must be at most {MAX_CHUNK_BYTES} bytes, and has {len(chunk)}"
                        raise InvalidRequest([Violation("chunk", says)])
                    count(len(chunk))
                    received += chunk
                data = bytes(received)
                digest = "sha256:" + hashlib.sha256(data).hexdigest()
                upload = self._store.get(owner, digest)
                outcome = UploadOutcome.KNOWN
                if upload is None:
                    outcome = UploadOutcome.CANCELLED
                    upload = await self._checked(owner, data)
                    self._store.put(owner, digest, upload)
                    outcome = UploadOutcome.STORED
        except DarkroomError as error:
            outcome = _outcome_of(error)
            raise
        finally:
            self._observer.upload_ended(outcome, len(received))
        return StoredUpload(
            upload_id=digest,
            width=upload.width,
            height=upload.height,
            expires_in=self._store.ttl,
        )

    async def _checked(self, owner: str, data: bytes) -> Upload:
        if not data:
            raise InvalidRequest([Violation("chunk", "must be the bytes of a picture, in parts")])
        width, height = (await self._decoder.decode(owner, "chunk", data, ANY_SIZE)).source
        return Upload(data=data, width=width, height=height)

    @contextmanager
    def _place(self, call: CallContext) -> Iterator[None]:
        owner = counted_as(call.caller)
        if self._open[owner] >= MAX_UPLOADS_PER_CALLER:
            raise QuotaExceeded(
                quota_subject(call.caller),
                f"{MAX_UPLOADS_PER_CALLER} uploads of {owner!r} arrive already; send fewer at once",
                RETRY_SECONDS,
            )
        self._open[owner] += 1
        try:
            yield
        finally:
            self._open[owner] -= 1
            if not self._open[owner]:
                del self._open[owner]


def _outcome_of(error: DarkroomError) -> UploadOutcome:
    match error:
        case InvalidRequest():
            return UploadOutcome.INVALID
        case Refused():
            return UploadOutcome.REFUSED
    return UploadOutcome.FAILED
