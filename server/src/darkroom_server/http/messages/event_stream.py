"""From a job's events to server-sent events."""

import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import structlog

from darkroom_server.core.errors import DarkroomError
from darkroom_server.core.events import PreviewReady, SampleProgress
from darkroom_server.dispatch import (
    ActiveJob,
    ImageDone,
    JobEvent,
    Queued,
    Restarted,
    Started,
    Subscription,
)
from darkroom_server.http.errors import error_answer, internal_error
from darkroom_server.http.messages.results import (
    ResultWriter,
    base64_text,
    json_bytes,
    off_loop,
)
from darkroom_server.service.summary import RequestSummary

log = structlog.get_logger(__name__)


def sse(name: str, data: Mapping[str, Any]) -> bytes:
    """One event. JSON has no line break, so its data is one line."""
    return b"event: " + name.encode() + b"\ndata: " + json_bytes(data) + b"\n\n"


async def event_stream(
    writer: ResultWriter,
    subscription: Subscription,
    summary: RequestSummary,
    *,
    joined: bool,
) -> AsyncGenerator[bytes]:
    """Everything that happens to a job, from its acceptance to its end or its error.

    The events of OpenAI, and our own between them if the request asks for them.
    """
    own = writer.request.progress
    if own:
        yield sse("darkroom.accepted", _accepted(writer, subscription.active, joined=joined))
    partials = PartialImages(writer, subscription.active)
    async for event in subscription:
        match event:
            case PreviewReady():
                if (index := partials.index_of(event)) is not None:
                    yield partials.event(event, index)
            case ImageDone(index):
                yield await _completed(writer, subscription, index)
            case _:
                if own:
                    name, data = _own_event(event)
                    yield sse(name, {"type": name, **data})
    finished = await subscription.active.result()
    summary.finished(finished)
    if own:
        total = time.monotonic() - summary.arrived
        data = writer.job_fields(finished.stages, total)
        yield sse("darkroom.finished", {"type": "darkroom.finished", **data})


def error_event(error: BaseException) -> bytes:
    """The last event of a stream that fails; OpenAI's clients raise the error in it."""
    if isinstance(error, DarkroomError):
        return sse("error", {"type": "error", **error_answer(error).body})
    log.error("stream failed", exc_info=error)
    return sse("error", {"type": "error", **internal_error().body})


class PartialImages:
    """Chooses the previews of each image that are sent: as many as asked for, evenly spaced."""

    def __init__(self, writer: ResultWriter, active: ActiveJob) -> None:
        self._writer = writer
        self._calls = active.model.denoiser_calls(active.job)
        self._count = writer.request.partial_images
        self._sent: dict[int, int] = {}

    def index_of(self, preview: PreviewReady) -> int | None:
        """The number of this preview among those that are sent, None if it is not sent."""
        sent = self._sent.get(preview.image_index, 0)
        due = preview.step * (self._count + 1) >= (sent + 1) * self._calls
        if sent >= self._count or not due:
            return None
        self._sent[preview.image_index] = sent + 1
        return sent

    def event(self, preview: PreviewReady, index: int) -> bytes:
        """The event of the preview with number ``index``."""
        name = f"{self._writer.request.events}.partial_image"
        data = {
            "type": name,
            "partial_image_index": index,
            "b64_json": base64_text(preview.data),
            "created_at": int(time.time()),
            "size": f"{preview.width}x{preview.height}",
            "quality": self._writer.request.quality,
            "background": "opaque",
            "output_format": preview.format.value,
            "image_index": preview.image_index,
            "step": preview.step,
            "steps": self._calls,
        }
        return sse(name, data)


async def _completed(writer: ResultWriter, subscription: Subscription, index: int) -> bytes:
    image = subscription.image(index)
    name = f"{writer.request.events}.completed"
    head = {
        "type": name,
        "created_at": int(time.time()),
        "size": f"{image.width}x{image.height}",
        "quality": writer.request.quality,
        "background": "opaque",
        "output_format": image.format.value,
        "usage": writer.usage(1),
        "image_index": index,
    }
    return await off_loop(
        len(image.data), lambda: sse(name, {**head, **writer.image(index, image)})
    )


def _accepted(writer: ResultWriter, active: ActiveJob, *, joined: bool) -> dict[str, Any]:
    job, estimate, now = active.job, active.estimate, time.monotonic()
    return {
        "type": "darkroom.accepted",
        "request_id": writer.request_id,
        "model": active.model.id,
        "model_revision": active.model.revision,
        "seeds": [job.seed_of(index) for index in range(job.image_count)],
        "joined": joined,
        "queue_position": active.position or 0,
        "estimated_seconds": max(0.0, estimate.finish_at - now) if estimate else None,
    }


def _own_event(event: JobEvent) -> tuple[str, dict[str, Any]]:
    match event:
        case Queued(position):
            return "darkroom.queued", {"position": position}
        case Started():
            return "darkroom.started", {}
        case Restarted(crashes):
            return "darkroom.restarted", {"crashes": crashes}
        case SampleProgress():
            return "darkroom.progress", {
                "image_index": event.image_index,
                "step": event.step,
                "steps": event.steps,
                "rows": event.rows,
                "step_seconds": event.seconds,
            }
    raise TypeError(f"no event for {event}")
