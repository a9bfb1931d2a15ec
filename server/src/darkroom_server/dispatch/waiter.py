"""One caller that waits for a job, and what it has not been told yet."""

import asyncio
from collections.abc import Callable
from typing import Self

from darkroom_server.core.events import PreviewReady, SampleProgress
from darkroom_server.dispatch.story import ImageDone, JobEvent, Restarted

Slot = tuple[type[JobEvent], int]


class Waiter:
    """A hold on a job, which ends with the ``with`` block, and an iterator over its events.

    The iteration ends with the job, whatever its end is. Each kind of event, for each image, has
    one slot: a waiter that is slow gets the latest progress and previews only, and never makes
    memory grow. Images are told of once each, so that none is lost. ``leave`` is told of the end
    of the hold.
    """

    def __init__(self, leave: "Callable[[Waiter], None]") -> None:
        self._leave = leave
        self._slots: dict[Slot, JobEvent] = {}
        self._news = asyncio.Event()
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._leave(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> JobEvent:
        while not self._slots:
            if self._ended:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._slots.pop(next(iter(self._slots)))

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


def _slot(event: JobEvent) -> Slot:
    match event:
        case SampleProgress() | PreviewReady() | ImageDone():
            return type(event), event.image_index
    return type(event), 0
