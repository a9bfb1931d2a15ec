"""One caller that waits for a job, and what it has not been told yet."""

import asyncio
from typing import TYPE_CHECKING, Self

from darkroom_server.core.errors import UnknownRequest
from darkroom_server.core.events import EncodedImage, PreviewReady, SampleProgress
from darkroom_server.dispatch.jobs.events import ImageDone, JobEvent, Restarted

if TYPE_CHECKING:
    from darkroom_server.dispatch.jobs.job import ActiveJob

STALL_SECONDS = 60.0
"""A waiter that takes nothing for so long, of a job that has ended, holds its images no longer."""

Slot = tuple[type[JobEvent], int]


class Subscription:
    """A hold on a job, which ends with the ``with`` block, and an iterator over its events.

    The iteration ends with the job, whatever its end is. Each kind of event, for each image, has
    one slot: a waiter that is slow gets the latest progress and previews only, and never makes
    memory grow. Images are told of once each, so that none is lost, and lie with the job.
    """

    def __init__(self, accepted: "ActiveJob") -> None:
        self._accepted: ActiveJob | None = accepted
        self._job_id = accepted.job.id
        self._slots: dict[Slot, JobEvent] = {}
        self._news = asyncio.Event()
        self._ended = False
        self._taken_at = 0.0
        self._watch: asyncio.TimerHandle | None = None

    @property
    def accepted(self) -> "ActiveJob":
        """The job; raises ``UnknownRequest`` where the waiter has stalled."""
        self._taken_at = asyncio.get_running_loop().time()
        if self._accepted is None:
            raise UnknownRequest(self._job_id)
        return self._accepted

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._watch is not None:
            self._watch.cancel()
        if self._accepted is not None:
            self._accepted.leave(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> JobEvent:
        while not self._slots:
            if self._ended:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        self._taken_at = asyncio.get_running_loop().time()
        return self._slots.pop(next(iter(self._slots)))

    def image(self, index: int) -> EncodedImage:
        """A finished image of the job; raises ``UnknownRequest`` where the waiter has stalled."""
        return self.accepted.images[index]

    def tell(self, event: JobEvent) -> None:
        """Put ``event`` into its slot; one that was there, and not taken yet, is lost."""
        if isinstance(event, Restarted):
            # What was told of the run before is not true any more; its images are.
            self._slots = {k: e for k, e in self._slots.items() if isinstance(e, ImageDone)}
        # A new value keeps the place of the old one, so that no slot waits for ever.
        self._slots[_slot(event)] = event
        self._news.set()

    def end(self) -> None:
        """The job has ended: what is in the slots is the last."""
        self._ended = True
        self._news.set()
        loop = asyncio.get_running_loop()
        self._taken_at = loop.time()
        self._watch = loop.call_later(STALL_SECONDS, self._let_go_if_stalled)

    def _let_go_if_stalled(self) -> None:
        loop = asyncio.get_running_loop()
        left = self._taken_at + STALL_SECONDS - loop.time()
        if left > 0:
            self._watch = loop.call_later(left, self._let_go_if_stalled)
        else:
            self._accepted = None


def _slot(event: JobEvent) -> Slot:
    match event:
        case SampleProgress() | PreviewReady() | ImageDone():
            return type(event), event.image_index
    return type(event), 0
