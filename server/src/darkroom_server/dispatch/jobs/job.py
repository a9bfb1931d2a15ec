"""An accepted job: its state, its images, its subscriptions and its result."""

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace
from enum import Enum, auto
from typing import TYPE_CHECKING

from darkroom_server.core.caller import ANONYMOUS, Caller
from darkroom_server.core.errors import DarkroomError, DeadlineExceeded, JobCancelled
from darkroom_server.core.events import PreviewReady, SampleProgress
from darkroom_server.core.finished_image import FinishedImage
from darkroom_server.core.job import Job
from darkroom_server.core.model import ModelInfo
from darkroom_server.core.order import OrderKey
from darkroom_server.dispatch.estimation.estimate import Estimate
from darkroom_server.dispatch.jobs.events import ImageDone, JobEvent, Queued, Restarted, Started
from darkroom_server.dispatch.jobs.outcomes import Finished, JobOutcome
from darkroom_server.dispatch.jobs.subscription import Subscription

if TYPE_CHECKING:
    from darkroom_server.dispatch.engines.handle import EngineHandle
    from darkroom_server.dispatch.entries import JobEntry


class JobState(Enum):
    """How far the server's work on a job is, or was at its end.

    From ``ASSIGNED`` on an engine has the job.
    """

    NEW = auto()
    QUEUED = auto()
    ASSIGNED = auto()
    ENCODING = auto()
    ENCODED = auto()
    DENOISING = auto()
    DECODING = auto()


CRASH_SUSPECT = frozenset({JobState.ENCODING, JobState.DENOISING, JobState.DECODING})
"""If the engine dies in these states, the job may be the cause."""

PHASES = {JobState.DENOISING: "denoise", JobState.DECODING: "decode"}


class ActiveJob:
    """A job from its acceptance to its end, shared by all calls that follow it.

    ``job`` and ``images`` (the finished ones, by index) are all that a rerun needs.
    ``engine``: the engine that has it, whether or not a caller still wants it. ``estimate``: made
    at acceptance, None for a rerun. ``position``: the number of jobs before it in the queue, None
    if it does not wait. ``remaining``: denoiser calls that remain, by image index, of the images
    that took a step. ``crashes``: engines that died while it ran; ``crashed_at``: when the last one
    did (``time.monotonic`` seconds). ``reattach_grace``: seconds that it continues without a
    subscription, infinite if it does not need one. ``on_unsubscribed`` is called after that.
    ``caller``: the one that began it. ``input_bytes``: the pixels that it brings; it holds them
    until it ends.

    ``entry``: its entry in the ledger, None without one. ``recording``: the write of its beginning.
    ``on_assigned`` is called when an engine gets it. ``released``: it ended because this server
    stops, not by itself. ``images_lost``: it finished at an earlier server, whose images are
    gone.
    """

    def __init__(self, job: Job, model: ModelInfo, caller: Caller = ANONYMOUS) -> None:
        self.job = job
        self.caller = caller
        self.model = model
        brings = job.image or job.reference_images or job.controls or job.ip_adapter_image
        self.input_bytes = sum(each.size_bytes for each in job.pictures) if brings else 0
        self.state = JobState.NEW
        self.engine: EngineHandle | None = None
        self.position: int | None = None
        self.estimate: Estimate | None = None
        self.images: dict[int, FinishedImage] = {}
        self.remaining: dict[int, int] = {}
        self.crashes = 0
        self.crashed_at: float | None = None
        self.reattach_grace = 0.0
        self.on_unsubscribed: Callable[[ActiveJob], None] = lambda _: None
        self.entry: JobEntry | None = None
        self.recording: asyncio.Task[None] | None = None
        self.on_assigned: Callable[[], object] | None = None
        self.released = False
        self.images_lost = False
        self._previewed = False
        self._result: Finished | DarkroomError | None = None
        # An event and not a future: cancelling one caller must not cancel what others await.
        self._ended = asyncio.Event()
        self._end_callbacks: list[Callable[[], object]] = []
        self._subscriptions: set[Subscription] = set()
        self._grace_timer: asyncio.TimerHandle | None = None

    @property
    def finished(self) -> bool:
        """The job ended with all its images."""
        return isinstance(self._result, Finished)

    @property
    def ended(self) -> bool:
        """The job has its result; its engine may still have to remove it."""
        return self._result is not None

    @property
    def outcome(self) -> JobOutcome | None:
        """How the job ended, None if it has not."""
        match self._result:
            case None:
                return None
            case Finished():
                return JobOutcome.FINISHED
            case DeadlineExceeded():
                return JobOutcome.EXPIRED
            case JobCancelled():
                return JobOutcome.CANCELLED
        return JobOutcome.FAILED

    @property
    def error(self) -> DarkroomError | None:
        """Why the job ended without all its images, None if it did not."""
        return self._result if isinstance(self._result, DarkroomError) else None

    @property
    def started(self) -> bool:
        """An engine has run a batch with it."""
        return self.state in PHASES

    @property
    def phase(self) -> str:
        """The phase: "queue", "denoise" while an image has steps to take, or "decode"."""
        return PHASES.get(self.state, "queue")

    @property
    def assigned(self) -> bool:
        """An engine has it, or had it at its end."""
        return self.state not in (JobState.NEW, JobState.QUEUED)

    @property
    def steps(self) -> int:
        """Denoiser calls in total, of all images together."""
        return self.model.denoiser_calls(self.job) * self.job.image_count

    @property
    def finished_images(self) -> int:
        """The number of finished images, whether or not they are still here."""
        return self.job.image_count if self.images_lost else len(self.images)

    @property
    def steps_done(self) -> int:
        """Denoiser calls done, of all images together; from 0 again after a restart."""
        each = self.model.denoiser_calls(self.job)
        begun = sum(each - left for i, left in self.remaining.items() if i not in self.images)
        return each * self.finished_images + begun

    @property
    def complete(self) -> bool:
        """Every image is there."""
        return len(self.images) == self.job.image_count

    @property
    def subscribers(self) -> int:
        """The number of calls that follow it."""
        return len(self._subscriptions)

    def key(self) -> OrderKey:
        """Its key for ``core.order``; a crash suspect goes behind jobs that cannot be the cause."""
        return OrderKey(
            id=(self.job.id, 0),
            submitted_at=self.crashed_at or self.job.submitted_at,
            remaining_steps=self.model.steps_taken(self.job)
            * (self.job.image_count - len(self.images)),
            priority=self.job.priority,
            deadline=None if self.crashes else self.job.deadline,
        )

    def remaining_job(self) -> Job:
        """The job without its finished images."""
        return replace(self.job, skip=frozenset(self.images)) if self.images else self.job

    # Subscriptions.

    def subscribe(self, *, images_only: bool = False) -> Subscription:
        """A subscription that first reports where the job stands and its finished images.

        ``images_only`` is as in ``Subscription``.
        """
        subscription = Subscription(self, images_only=images_only)
        if self._grace_timer is not None:
            self._grace_timer.cancel()
            self._grace_timer = None
        if self.position is not None:
            subscription.put(Queued(self.position))
        elif self.started:
            subscription.put(Started())
        for index in self.images:
            subscription.put(ImageDone(index))
        if self.ended:
            subscription.end()
        else:
            self._subscriptions.add(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """Remove a subscription; without any, the job ends after its grace time."""
        self._subscriptions.discard(subscription)
        if self._subscriptions or self.ended or self.reattach_grace == math.inf:
            return
        if self.reattach_grace == 0.0:
            self.on_unsubscribed(self)
            return
        loop = asyncio.get_running_loop()
        self._grace_timer = loop.call_later(self.reattach_grace, self.on_unsubscribed, self)

    async def result(self) -> Finished:
        """Wait for the end; raises the job's error if it did not finish."""
        await self._ended.wait()
        if isinstance(self._result, Finished):
            return self._result
        raise self._result or RuntimeError(f"job {self.job.id} has no result")

    def add_end_callback(self, callback: Callable[[], object]) -> None:
        """Call ``callback`` at the end, after the subscriptions were notified."""
        self._end_callbacks.append(callback)

    # Changes, made by the lifecycle and the event router.

    def publish(self, event: JobEvent) -> None:
        """Send ``event`` to every subscription."""
        for subscription in self._subscriptions:
            subscription.put(event)

    def set_position(self, position: int) -> None:
        """Note the job's place in the queue; publishes it if it changed."""
        if position != self.position:
            self.position = position
            self.publish(Queued(position))

    def start(self) -> None:
        """Its first batch begins."""
        self.state = JobState.DENOISING
        self.publish(Started())

    def advance(self, progress: SampleProgress) -> None:
        """One of its images took a step."""
        self.remaining[progress.image_index] = progress.steps - progress.step
        if progress.step == progress.steps:
            undone = [i for i in range(self.job.image_count) if i not in self.images]
            if not any(self.remaining.get(index, 1) for index in undone):
                self.state = JobState.DECODING
        self.publish(progress)

    def add_preview(self, preview: PreviewReady) -> bool:
        """Publish a preview; True if it is the job's first."""
        first, self._previewed = not self._previewed, True
        self.publish(preview)
        return first

    def add_image(self, index: int, image: FinishedImage) -> None:
        """Keep and publish a finished image, unless the job has ended."""
        if not self.ended:
            self.images[index] = image
            self.publish(ImageDone(index))

    def record_crash(self, now: float) -> None:
        """Its engine died at ``now``, in ``time.monotonic`` seconds."""
        if self.state in CRASH_SUSPECT:
            self.crashes += 1
            self.crashed_at = now
        self.reset()

    def reset(self) -> None:
        """Prepare a rerun: keep nothing but the finished images."""
        self.state = JobState.NEW
        self.remaining.clear()
        self.estimate = None  # It was made for the run that did not finish.

    def publish_restart(self) -> None:
        """Publish that the job runs again, if it had begun."""
        if self.crashes:
            self.publish(Restarted(self.crashes))

    def end(self, result: Finished | DarkroomError) -> JobOutcome | None:
        """Set the result and wake everything that waits for it; None if the job had ended."""
        if self._result is not None:
            return None
        self._result = result
        if self.input_bytes:
            self.job = self.job.without_pixels()
        self._ended.set()
        if self._grace_timer is not None:
            self._grace_timer.cancel()
        for subscription in self._subscriptions:
            subscription.end()
        self._subscriptions.clear()
        callbacks, self._end_callbacks, self.on_assigned = self._end_callbacks, [], None
        for callback in callbacks:
            callback()
        return self.outcome
