"""Decode the messages of a stream to events and whole images."""

from darkroom.v1 import generation_pb2
from darkroom_client._types.enums import ImageFormat
from darkroom_client._types.events import Accepted, FinishReason, Preview, Progress
from darkroom_client._types.image import Image
from darkroom_client._wire.results import decode_image, unreadable
from darkroom_client._wire.values import decode_format, decode_seconds


class ImageAssembly:
    """Joins the chunks of one image after the other, and checks that they fit.

    Each stream needs a new one: its chunks start from the beginning.
    """

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._head: generation_pb2.ImageChunk | None = None
        self._pieces = bytearray()

    def add(self, chunk: generation_pb2.ImageChunk) -> tuple[int, Image] | None:
        """Return the index and the image that ``chunk`` completes; None while chunks are missing.

        Raises ``ServerError`` for chunks that do not fit together.
        """
        if self._head is None:
            if not chunk.HasField("image") or chunk.image.data:
                raise unreadable("an image that begins without its description", self._request_id)
            self._head = chunk
        head = self._head
        if chunk.image_index != head.image_index or chunk.offset != len(self._pieces):
            raise unreadable("pieces of an image out of their order", self._request_id)
        self._pieces += chunk.data
        missing = head.size - len(self._pieces)
        if missing < 0 or (missing and not chunk.data):
            raise unreadable("pieces that do not make an image of its size", self._request_id)
        if missing:
            return None
        message, data = head.image, bytes(self._pieces)
        self._head = None
        self._pieces.clear()
        return head.image_index, decode_image(message, self._request_id, data)

    @property
    def busy(self) -> bool:
        """An image has begun and is incomplete."""
        return self._head is not None


def decode_accepted(accepted: generation_pb2.Accepted) -> Accepted:
    """Decode the event."""
    return Accepted(
        request_id=accepted.request_id,
        seeds=tuple(accepted.seeds),
        queue_position=accepted.queue_position,
        estimated_start=(
            decode_seconds(accepted.estimated_start)
            if accepted.HasField("estimated_start")
            else None
        ),
        estimated_finish=(
            decode_seconds(accepted.estimated_finish)
            if accepted.HasField("estimated_finish")
            else None
        ),
        model=accepted.model,
        model_revision=accepted.model_revision,
        joined=accepted.joined,
        server_id=accepted.server_id,
    )


def decode_progress(progress: generation_pb2.Progress, first: int) -> Progress:
    """Decode the event; ``first`` is the index of the job's first image in the request."""
    return Progress(
        image_index=first + progress.image_index,
        step=progress.step,
        steps=progress.steps,
        rows=progress.rows,
        step_seconds=decode_seconds(progress.step_time),
    )


def decode_preview(preview: generation_pb2.Preview, first: int) -> Preview | None:
    """Decode the event; None if the format is newer than this client."""
    image_format: ImageFormat | None = decode_format(preview.format)
    if image_format is None:
        return None
    return Preview(
        image_index=first + preview.image_index,
        step=preview.step,
        data=preview.data,
        format=image_format,
        width=preview.width,
        height=preview.height,
    )


def decode_reason(finished: generation_pb2.Finished) -> FinishReason:
    """Decode how the job finished; a reason newer than this client counts as COMPLETED."""
    if finished.reason == generation_pb2.FINISH_REASON_WITHHELD:
        return FinishReason.WITHHELD
    return FinishReason.COMPLETED
