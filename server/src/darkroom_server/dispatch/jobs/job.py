"""A job that was accepted: where it is, what it has so far, who waits for it, and its one end."""

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum, auto

from darkroom_server.core.errors import DarkroomError
from darkroom_server.core.events import EncodedImage, SampleProgress, StageSeconds
from darkroom_server.core.job import Job
from darkroom_server.core.model import ModelInfo
from darkroom_server.core.order import OrderKey
from darkroom_server.dispatch.jobs.estimate import Estimate
from darkroom_server.dispatch.jobs.events import ImageDone, JobEvent, Queued, Restarted, Started
from darkroom_server.dispatch.jobs.subscription import Subscription


class JobState(Enum):
    """Where a job is. A job that ended early stays ENGINE until the engine has let it go."""

    OUTSIDE = auto()
    QUEUE = auto()
    ENGINE = auto()


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a job that went well: its images in order, and where the time went."""

    images: tuple[EncodedImage, ...]
    stages: StageSeconds


class ActiveJob:
    """A job, from its acceptance to its end, shared by everybody who waits for it.

    ``job`` and ``images`` (those finished so far, by index) are all that a second run needs.
    ``estimate`` is what was expected at its acceptance, None for one that is run again.
    ``position`` says how many go before it, None where it does not wait. ``taken`` says that an
    engine encodes its prompts, ``started`` that one has begun with its passes, ``developed`` how
    many images took their last step there, ``previewed`` that there was a preview of one,
    ``crashes`` how many engines died while it ran, ``crashed_at`` when the last of them did
    (``time.monotonic`` seconds). When its last waiter has left, it is given up after ``linger``
    seconds.
    """

    def __init__(self, job: Job, model: ModelInfo, give_up: Callable[[str], None]) -> None:
        self.job = job
        self.model = model
        self.place = JobState.OUTSIDE
        self.position: int | None = None
        self.estimate: Estimate | None = None
        self.taken = False
        self.started = False
        self.developed = 0
        self.previewed = False
        self.crashes = 0
        self.crashed_at: float | None = None
        self.images: dict[int, EncodedImage] = {}
        self.linger = 0.0
        self._give_up = give_up
        self._waiters: set[Subscription] = set()
        self._lingering: asyncio.TimerHandle | None = None
        # An event and not a future: a caller that is cancelled would cancel a future it awaits.
        self._ended = asyncio.Event()
        self._outcome: Finished | DarkroomError | None = None
        self._when_ended: list[Callable[[], None]] = []

    @property
    def finished(self) -> bool:
        """Every image was drawn."""
        return isinstance(self._outcome, Finished)

    @property
    def waiters(self) -> int:
        """How many wait for it."""
        return len(self._waiters)

    @property
    def ended(self) -> bool:
        """Nothing more will be told to the waiters."""
        return self._ended.is_set()

    @property
    def suspect(self) -> bool:
        """It may be what kills the engine, should that die now."""
        return self.taken or self.started

    @property
    def phase(self) -> str:
        """How far it is: "queue", "denoise" while an image has steps to take, or "decode"."""
        if not self.started:
            return "queue"
        return "denoise" if self.developed < self.job.image_count else "decode"

    def key(self) -> OrderKey:
        """What the order needs to know.

        What may have killed an engine goes behind those that surely did not.
        """
        return OrderKey(
            id=(self.job.id, 0),
            submitted_at=self.crashed_at or self.job.submitted_at,
            remaining_steps=self.job.steps * (self.job.image_count - len(self.images)),
            priority=self.job.priority,
            deadline=None if self.crashes else self.job.deadline,
        )

    def remaining_job(self) -> Job:
        """The job, less the images that are finished."""
        return replace(self.job, skip=frozenset(self.images))

    # Who waits.

    def waiter(self) -> Subscription:
        """A new waiter: it is told where the job is, of the finished images, and what follows."""
        waiter = Subscription(self)
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
        if self.position is not None:
            waiter.tell(Queued(self.position))
        elif self.started:
            waiter.tell(Started())
        for index in self.images:
            waiter.tell(ImageDone(index))
        if self.ended:
            waiter.end()
        else:
            self._waiters.add(waiter)
        return waiter

    async def result(self) -> Finished:
        """Wait for the end; raises what it was, where the job was not finished."""
        await self._ended.wait()
        if isinstance(self._outcome, Finished):
            return self._outcome
        raise self._outcome or RuntimeError(f"job {self.job.id} has no end")

    def when_ended(self, tell: Callable[[], None]) -> None:
        """Call ``tell`` at the end, once the waiters know."""
        self._when_ended.append(tell)

    # What happens to it.

    def tell(self, event: JobEvent) -> None:
        """Let every waiter know."""
        for waiter in self._waiters:
            waiter.tell(event)

    def waits(self, position: int) -> None:
        """The job waits behind ``position`` others; told where that is news."""
        if position != self.position:
            self.position = position
            self.tell(Queued(position))

    def starts(self) -> None:
        """An engine begins with it."""
        self.started = True
        self.tell(Started())

    def steps(self, progress: SampleProgress) -> None:
        """One of its images took a step."""
        if progress.step == progress.steps:
            self.developed += 1
        self.tell(progress)

    def draws(self, index: int, image: EncodedImage) -> None:
        """Image ``index`` is finished; nobody wants it any more where the job has ended."""
        if not self.ended:
            self.images[index] = image
            self.tell(ImageDone(index))

    def engine_died(self, now: float) -> None:
        """The engine that this job was in died, at ``now`` (``time.monotonic`` seconds)."""
        if self.suspect:
            self.crashes += 1
            self.crashed_at = now
        self.starts_over()

    def starts_over(self) -> None:
        """It has left its engine unfinished, to be run again."""
        self.taken = self.started = False
        self.estimate = None  # It was for a run that did not come to its end.
        self.developed = len(self.images)

    def restarts(self) -> None:
        """It waits to be run again, though it may not have begun."""
        if self.crashes:
            self.tell(Restarted(self.crashes))

    def end(self, outcome: Finished | DarkroomError) -> None:
        """Wake whoever waits, with ``outcome``."""
        self._outcome = outcome
        self._ended.set()
        if self._lingering is not None:
            self._lingering.cancel()
        for waiter in self._waiters:
            waiter.end()
        self._waiters.clear()
        for tell in self._when_ended:
            tell()

    def leave(self, waiter: Subscription) -> None:
        """``waiter`` waits no longer."""
        self._waiters.discard(waiter)
        if self._waiters or self.ended or self.linger == math.inf:
            return
        if self.linger == 0.0:
            self._give_up(self.job.id)
            return
        loop = asyncio.get_running_loop()
        self._lingering = loop.call_later(self.linger, self._give_up, self.job.id)
