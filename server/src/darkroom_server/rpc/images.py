"""ImageService over gRPC: uploads."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from darkroom.v1 import image_pb2, image_pb2_grpc
from darkroom_server.core.errors import DeadlineExceeded
from darkroom_server.rpc.context import Context
from darkroom_server.rpc.responses import duration_message
from darkroom_server.service.call_context import CURRENT_CALL
from darkroom_server.service.uploads import UploadService

CHUNK_SECONDS = 20.0
"""The most that a part of an upload may take to arrive."""

UPLOAD_SECONDS = 300.0
"""The most that a whole upload may take to arrive."""


class ImageServicer(image_pb2_grpc.ImageServiceServicer):
    """Converts each call for ``UploadService``; raises ``DarkroomError``."""

    def __init__(self, uploads: UploadService) -> None:
        self._uploads = uploads

    async def UploadImage(
        self, requests: AsyncIterator[image_pb2.UploadImageRequest], context: Context
    ) -> image_pb2.UploadImageResponse:
        """Store one picture for its caller."""
        upload = await self._uploads.receive(CURRENT_CALL.get(), _chunks(requests))
        return image_pb2.UploadImageResponse(
            upload_id=upload.upload_id,
            width=upload.width,
            height=upload.height,
            expires_in=duration_message(upload.expires_in),
        )


async def _chunks(requests: AsyncIterator[image_pb2.UploadImageRequest]) -> AsyncIterator[bytes]:
    """The parts as they arrive; raises ``DeadlineExceeded`` if that takes too long."""
    loop = asyncio.get_running_loop()
    ends_at = loop.time() + UPLOAD_SECONDS
    while True:
        # Never cancelled: gRPC writes to the memory of a read that is under way. It ends with the
        # call at the latest.
        read = asyncio.ensure_future(anext(requests, None))
        read.add_done_callback(_forget)
        seconds = min(CHUNK_SECONDS, ends_at - loop.time())
        done, _ = await asyncio.wait({read}, timeout=max(0.0, seconds))
        if not done:
            raise DeadlineExceeded(
                f"the upload did not arrive in time: {CHUNK_SECONDS:g} s for each part, and "
                f"{UPLOAD_SECONDS:g} s in all"
            )
        message = read.result()
        if message is None:
            return
        yield message.chunk


def _forget(read: "asyncio.Future[Any]") -> None:
    if not read.cancelled():
        read.exception()  # Of a call that ended first; any other is raised above.
