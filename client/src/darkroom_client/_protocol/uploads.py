"""Images that are too large for a request: they are uploaded before it."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from darkroom.v1 import generation_pb2, image_pb2
from darkroom_client._errors import DarkroomError, UploadNotFound

MAX_REQUEST_BYTES = 2**20 - 2**16
"""Of a message without uploads. A server takes 1 MiB; the rest is for what wraps the message."""

CHUNK_BYTES = 2**19

MAX_REPEATS = 5
"""Tries after the server did not have an upload. Servers behind one name do not share uploads, and
a balanced connection sends each call to the next of them; so each try uploads once more often."""


@dataclass(frozen=True, slots=True)
class Upload:
    """A file to send before a call. ``again``: even if this client has sent it before."""

    upload_id: str
    data: bytes
    again: bool = False

    def chunks(self) -> "UploadChunks":
        """The messages of the call."""
        return UploadChunks(self)


class UploadChunks:
    """The messages of an ``UploadImage`` call, with what they are of."""

    def __init__(self, upload: Upload) -> None:
        self.upload_id = upload.upload_id
        self._starts = iter(range(0, len(upload.data), CHUNK_BYTES))
        self._data = upload.data

    def __iter__(self) -> Iterator[image_pb2.UploadImageRequest]:
        return self

    def __next__(self) -> image_pb2.UploadImageRequest:
        start = next(self._starts)
        return image_pb2.UploadImageRequest(chunk=self._data[start : start + CHUNK_BYTES])


class UploadMethod:
    """``UploadImage`` as a method that takes an ``Upload`` instead of a stream of messages."""

    def __init__(self, method: Any) -> None:
        self._method = method

    def __call__(self, upload: Upload, **options: Any) -> Any:
        """Begin the call of an asyncio channel."""
        return self._method(upload.chunks(), **options)

    def future(self, upload: Upload, **options: Any) -> Any:
        """Begin the call of a blocking channel."""
        return self._method.future(upload.chunks(), **options)


def move_to_uploads(message: generation_pb2.GenerateRequest) -> tuple[Upload, ...]:
    """Replace the largest images of ``message`` by upload ids until it is small enough."""
    images = sorted(_images(message), key=lambda image: len(image.data), reverse=True)
    uploads: dict[str, Upload] = {}
    for image in images:
        if message.ByteSize() <= MAX_REQUEST_BYTES or not image.data:
            break
        upload_id = "sha256:" + hashlib.sha256(image.data).hexdigest()
        uploads[upload_id] = Upload(upload_id, image.data)
        image.upload_id = upload_id  # Clears the data.
    return tuple(uploads.values())


def _images(message: generation_pb2.GenerateRequest) -> Iterator[image_pb2.ImageInput]:
    for name in ("image", "mask_image", "ip_adapter_image"):
        if message.HasField(name):
            yield getattr(message, name)
    yield from message.reference_images
    for control in message.controls:
        yield control.image


class UploadState:
    """Which uploads are due before the next try of a call. It does no I/O."""

    def __init__(self, uploads: tuple[Upload, ...]) -> None:
        self._uploads = uploads
        self._due = uploads
        self._repeats = 0

    def take(self) -> tuple[Upload, ...]:
        """The uploads to send before the try that begins now."""
        due, self._due = self._due, ()
        return due

    def lost(self, error: DarkroomError) -> bool:
        """Whether ``error`` says that uploads are gone which the next try can send again."""
        if not isinstance(error, UploadNotFound) or self._repeats >= MAX_REPEATS:
            return False
        missing = error.upload_ids
        again = [replace(each, again=True) for each in self._uploads if each.upload_id in missing]
        self._repeats += 1
        self._due = tuple(again * (self._repeats + 1))
        return len(again) == len(missing)
