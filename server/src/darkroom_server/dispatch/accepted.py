"""A job that was accepted: where it is, what it has so far, and its one end."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Self

from darkroom_server.core.errors import DarkroomError
from darkroom_server.core.events import EncodedImage, StageSeconds
from darkroom_server.core.job import Job
from darkroom_server.core.order import OrderKey


class Place(Enum):
    """Where a job is. A job that ended early stays ENGINE until the engine has let it go."""

    OUTSIDE = auto()
    QUEUE = auto()
    ENGINE = auto()


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a job that went well: its images in order, and where the time went."""

    images: tuple[EncodedImage, ...]
    stages: StageSeconds


class AcceptedJob:
    """The caller's hold on a job: leaving the ``with`` block gives the job up, unless it ended.

    ``job`` and ``images`` (those finished so far, by index) are all that a second run needs.
    ``started`` says that an engine has begun with it, ``developed`` how many images took their
    last step there, ``crashes`` how many engines died while it ran, ``crashed_at`` when the last
    of them did (``time.monotonic`` seconds).
    """

    def __init__(self, job: Job, give_up: Callable[[str], None]) -> None:
        self.job = job
        self.place = Place.OUTSIDE
        self.started = False
        self.developed = 0
        self.crashes = 0
        self.crashed_at: float | None = None
        self.images: dict[int, EncodedImage] = {}
        self._give_up = give_up
        # An event and not a future: a caller that is cancelled would cancel a future it awaits.
        self._ended = asyncio.Event()
        self._outcome: Finished | DarkroomError | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._give_up(self.job.id)

    @property
    def ended(self) -> bool:
        """Nothing more will be told to the caller."""
        return self._ended.is_set()

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

    def engine_died(self, now: float) -> None:
        """The engine that this job was in died, at ``now`` (``time.monotonic`` seconds)."""
        if self.started:
            self.crashes += 1
            self.crashed_at = now
        self.started = False
        self.developed = len(self.images)

    def remaining_job(self) -> Job:
        """The job, less the images that are finished."""
        return replace(self.job, skip=frozenset(self.images))

    async def result(self) -> Finished:
        """Wait for the end; raises ``DeadlineExceeded``, ``GenerationFailed`` or ``NotReady``."""
        await self._ended.wait()
        if isinstance(self._outcome, Finished):
            return self._outcome
        raise self._outcome or RuntimeError(f"job {self.job.id} was given up by its caller")

    def end(self, outcome: Finished | DarkroomError | None) -> None:
        """Wake the caller with ``outcome``; None where the caller is the one who left."""
        self._outcome = outcome
        self._ended.set()
