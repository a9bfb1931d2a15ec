"""One call that follows a job, and the events that it has not read yet."""

import asyncio
from typing import TYPE_CHECKING, Self

from darkroom_server.core.errors import UnknownRequest
from darkroom_server.core.events import PreviewReady, SampleProgress
from darkroom_server.core.finished_image import FinishedImage
from darkroom_server.dispatch.jobs.events import ImageDone, JobEvent, Restarted

if TYPE_CHECKING:
    from darkroom_server.dispatch.jobs.job import ActiveJob

STALL_SECONDS = 60.0
"""A subscription that reads nothing for this long after the end no longer holds the images."""

IMAGES = (PreviewReady, ImageDone)

EventKey = tuple[type[JobEvent], int]


class Subscription:
    """A reference to a job for the ``with`` block, and an iterator over the job's events.

    The iteration ends with the job, whatever its result is. One event is kept for each kind and
    image: a slow reader gets the latest progress and previews only, so that its memory is bounded.
    Every image is reported once. The job holds the images. ``images_only``: previews and images
    alone, so that what waits for them does not run each time that a place in the queue changes.
    """

    def __init__(self, active: "ActiveJob", *, images_only: bool = False) -> None:
        self._active: ActiveJob | None = active
        self._images_only = images_only
        self._job_id = active.job.id
        self._unread: dict[EventKey, JobEvent] = {}
        self._changed = asyncio.Event()
        self._ended = False
        self._read_at = 0.0
        self._stall_timer: asyncio.TimerHandle | None = None

    @property
    def active(self) -> "ActiveJob":
        """The job; raises ``UnknownRequest`` if the subscription has stalled."""
        self._read_at = asyncio.get_running_loop().time()
        if self._active is None:
            raise UnknownRequest(self._job_id)
        return self._active

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        if self._active is not None:
            self._active.unsubscribe(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> JobEvent:
        while not self._unread:
            if self._ended:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        self._read_at = asyncio.get_running_loop().time()
        return self._unread.pop(next(iter(self._unread)))

    def image(self, index: int) -> FinishedImage:
        """A finished image; raises ``UnknownRequest`` if the subscription has stalled."""
        return self.active.images[index]

    def put(self, event: JobEvent) -> None:
        """Add ``event``; it replaces an unread one of the same kind and image."""
        if isinstance(event, Restarted):
            # The events of the run before no longer hold; its images do.
            self._unread = {k: e for k, e in self._unread.items() if isinstance(e, ImageDone)}
        if self._images_only and not isinstance(event, IMAGES):
            return
        # A new value keeps the place of the old one, so that every kind is read in turn.
        self._unread[_key(event)] = event
        self._changed.set()

    def end(self) -> None:
        """The job has ended; no further event follows."""
        self._ended = True
        self._changed.set()
        loop = asyncio.get_running_loop()
        self._read_at = loop.time()
        self._stall_timer = loop.call_later(STALL_SECONDS, self._check_stalled)

    def _check_stalled(self) -> None:
        loop = asyncio.get_running_loop()
        remaining = self._read_at + STALL_SECONDS - loop.time()
        if remaining > 0:
            self._stall_timer = loop.call_later(remaining, self._check_stalled)
        else:
            self._active = None


def _key(event: JobEvent) -> EventKey:
    match event:
        case SampleProgress() | PreviewReady() | ImageDone():
            return type(event), event.image_index
    return type(event), 0
