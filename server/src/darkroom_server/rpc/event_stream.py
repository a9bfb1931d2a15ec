"""From a job's events to the messages of a stream."""

import math
import time
from collections.abc import AsyncGenerator, Iterator

from darkroom.v1 import generation_pb2
from darkroom_server.core.events import PreviewReady, SampleProgress
from darkroom_server.core.finished_image import RelayedImage
from darkroom_server.dispatch import (
    ActiveJob,
    Finished,
    ImageDone,
    JobEvent,
    Queued,
    Restarted,
    Started,
    Subscription,
)
from darkroom_server.rpc.enums import FORMAT_TO_WIRE
from darkroom_server.rpc.responses import duration_message, image_message, timings_message

CHUNK_BYTES = 512 * 1024
"""The most image bytes in one message, far below any client's limit."""

Event = generation_pb2.GenerationEvent


async def event_stream(
    request_id: str,
    subscription: Subscription,
    *,
    server_id: str,
    joined: bool,
    previews: bool,
) -> AsyncGenerator[Event | bytes]:
    """Everything that happens to a job before its end; ``finished_event`` comes after.

    Holds neither an image nor the job while the reader is slow: it fetches each piece when it is
    sent. Bytes are a whole response of ``WatchGeneration``, which is one of ``GenerateStream`` too.
    """
    accepted = accepted_message(request_id, subscription.active, server_id=server_id, joined=joined)
    yield Event(accepted=accepted)
    async for event in subscription:
        match event:
            case ImageDone(index):
                for chunk in image_chunks(subscription, index):
                    yield chunk
            case PreviewReady() if not previews:
                pass
            case _:
                yield event_message(event)


def accepted_message(
    request_id: str, active: ActiveJob, *, server_id: str, joined: bool
) -> generation_pb2.Accepted:
    """What the server will generate, and when."""
    job = active.job
    message = generation_pb2.Accepted(
        request_id=request_id,
        seeds=[job.seed_of(index) for index in range(job.image_count)],
        queue_position=active.position or 0,
        model=active.model.id,
        model_revision=active.model.revision,
        joined=joined,
        server_id=server_id,
    )
    if (estimate := active.estimate) is not None:
        now = time.monotonic()
        message.estimated_start.CopyFrom(duration_message(max(0.0, estimate.start_at - now)))
        message.estimated_finish.CopyFrom(duration_message(max(0.0, estimate.finish_at - now)))
    return message


def event_message(event: JobEvent) -> Event:
    """``event`` as a message; images have ``image_chunks``."""
    match event:
        case Queued(position):
            return Event(queued=generation_pb2.Queued(position=position))
        case Started():
            return Event(started=generation_pb2.Started())
        case Restarted(crashes):
            return Event(restarted=generation_pb2.Restarted(crashes=crashes))
        case SampleProgress():
            return Event(
                progress=generation_pb2.Progress(
                    image_index=event.image_index,
                    step=event.step,
                    steps=event.steps,
                    rows=event.rows,
                    step_time=duration_message(event.seconds),
                )
            )
        case PreviewReady():
            return Event(
                preview=generation_pb2.Preview(
                    image_index=event.image_index,
                    step=event.step,
                    data=event.data,
                    format=FORMAT_TO_WIRE[event.format],
                    width=event.width,
                    height=event.height,
                )
            )
    raise TypeError(f"no message for {event}")


def image_chunks(subscription: Subscription, index: int) -> Iterator[Event | bytes]:
    """Image ``index`` in chunks; a withheld one is a single chunk without data.

    Those of another server pass as it sent them: nothing large is decoded and encoded again, and
    what a newer server says of its images is not lost.
    """
    image = subscription.image(index)
    if isinstance(image, RelayedImage):
        count = len(image.messages)
    else:
        count = max(1, math.ceil(len(image.data) / CHUNK_BYTES))
    del image
    for number in range(count):
        yield _image_chunk(subscription.active, index, number)


def _image_chunk(active: ActiveJob, index: int, number: int) -> Event | bytes:
    image = active.images[index]
    if isinstance(image, RelayedImage):
        return image.messages[number]
    offset = number * CHUNK_BYTES
    chunk = generation_pb2.ImageChunk(
        image_index=index,
        size=len(image.data),
        offset=offset,
        data=image.data[offset : offset + CHUNK_BYTES],
    )
    if offset == 0:
        chunk.image.CopyFrom(image_message(active.job, active.model, image, data=b""))
    return Event(image=chunk)


def finished_event(active: ActiveJob, finished: Finished, arrived: float) -> Event:
    """The last event, for a call that arrived at ``arrived`` (``time.monotonic`` seconds)."""
    withheld = any(image.flagged for image in finished.images)
    return Event(
        finished=generation_pb2.Finished(
            reason=generation_pb2.FINISH_REASON_WITHHELD
            if withheld
            else generation_pb2.FINISH_REASON_COMPLETED,
            timings=timings_message(finished.stages, time.monotonic() - arrived),
            model=active.model.id,
            model_revision=active.model.revision,
        )
    )
