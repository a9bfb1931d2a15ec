"""The engines: which are there, what is in them, and how a dead one comes back."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

import structlog

from darkroom_server.core.engine import Engine
from darkroom_server.core.events import EngineDied, EngineReady, Event, PassDone
from darkroom_server.core.job import Job
from darkroom_server.dispatch.accepted import AcceptedJob
from darkroom_server.dispatch.observer import Observer

log = structlog.get_logger(__name__)

FIRST_BACKOFF_SECONDS = 0.25
LONGEST_BACKOFF_SECONDS = 30.0
RESTART_WINDOW_SECONDS = 600.0
"""Deaths in this time are counted together."""

SPEED_MEMORY = 0.9
"""Part of an engine's measured speed that the next pass leaves as it was."""


class Slot:
    """One engine, and the jobs in it."""

    def __init__(self, index: int, engine: Engine) -> None:
        self.index = index
        self.engine = engine
        self.ready = False
        self.jobs: dict[str, AcceptedJob] = {}
        self._rows_per_second = 1.0

    @property
    def samples(self) -> int:
        """Images in the engine."""
        return sum(accepted.job.image_count for accepted in self.jobs.values())

    @property
    def quarantined(self) -> bool:
        """A job is in it that was running when an engine died: nobody shares its fate."""
        return any(accepted.crashes for accepted in self.jobs.values())

    @property
    def seconds_of_work(self) -> float:
        """How long the jobs in it would take from their first step, at the speed of late."""
        return sum(_row_steps(a.job) for a in self.jobs.values()) / self._rows_per_second

    def passed(self, event: PassDone) -> None:
        """Learn the engine's speed from a pass."""
        if event.seconds > 0:
            speed = event.rows / event.seconds
            self._rows_per_second += (1 - SPEED_MEMORY) * (speed - self._rows_per_second)


class Fleet:
    """Starts the engines, restarts those that die, and chooses one for each job.

    ``on_event`` is told what engines say of jobs and of themselves, ``on_crash`` the jobs that
    were in an engine when it died, ``on_change`` that an engine came or went, and ``on_end`` that
    no engine will ever come back, with one line for the operator. All on the event loop.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        *,
        max_resident_samples: int,
        max_restarts: int,
        observer: Observer,
        on_event: Callable[[Event], None],
        on_crash: Callable[[list[AcceptedJob]], None],
        on_change: Callable[[], None],
        on_end: Callable[[str], None],
    ) -> None:
        self._slots = [Slot(index, engine) for index, engine in enumerate(engines)]
        self._max_resident_samples = max_resident_samples
        self._max_restarts = max_restarts
        self._observer = observer
        self._on_event = on_event
        self._on_crash = on_crash
        self._on_change = on_change
        self._on_end = on_end
        self._was_ready = False
        self._closing = False
        self._deaths: deque[float] = deque()
        self._restarts: set[asyncio.TimerHandle] = set()

    @property
    def ready(self) -> bool:
        """Whether an engine could take a job now."""
        return any(slot.ready for slot in self._slots)

    def start(self) -> None:
        """Let every engine load."""
        for slot in self._slots:
            self._start(slot)

    async def close(self) -> None:
        """Stop every engine; waits until they have."""
        self._closing = True
        for timer in self._restarts:
            timer.cancel()
        await asyncio.gather(*(asyncio.to_thread(slot.engine.close) for slot in self._slots))

    def choose(self, accepted: AcceptedJob) -> Slot | None:
        """The engine that would finish a job first, None where none has room for it.

        A job that may have killed an engine waits for one that is empty.
        """
        able = [slot for slot in self._slots if slot.ready and not slot.quarantined]
        if accepted.crashes:
            able = [slot for slot in able if not slot.jobs]
        else:
            able = [slot for slot in able if slot.samples < self._max_resident_samples]
        return min(able, key=lambda slot: slot.seconds_of_work, default=None)

    def hand_over(self, accepted: AcceptedJob, slot: Slot) -> None:
        """Give a job to an engine, less the images that an earlier one finished."""
        slot.jobs[accepted.job.id] = accepted
        slot.engine.submit(accepted.remaining_job())

    def cancel(self, job_id: str) -> None:
        """Tell the engine that has this job to let it go."""
        for slot in self._slots:
            if job_id in slot.jobs:
                slot.engine.cancel(job_id)

    def extend(self, job_id: str, deadline: float | None) -> None:
        """Tell the engine that has this job of its new deadline."""
        for slot in self._slots:
            if job_id in slot.jobs:
                slot.engine.extend(job_id, deadline)

    def left(self, job_id: str) -> None:
        """Note that the engine that had this job has let it go."""
        for slot in self._slots:
            slot.jobs.pop(job_id, None)

    def _start(self, slot: Slot) -> None:
        loop = asyncio.get_running_loop()

        def emit(event: Event) -> None:
            with suppress(RuntimeError):  # The loop is closed, and nobody is left to tell.
                loop.call_soon_threadsafe(self._on_slot_event, slot, event)

        slot.engine.start(emit)

    def _on_slot_event(self, slot: Slot, event: Event) -> None:
        match event:
            case EngineReady():
                self._was_ready = slot.ready = True
                self._on_event(event)
                self._on_change()
            case EngineDied(message):
                self._on_death(slot, message)
            case PassDone():
                slot.passed(event)
                self._on_event(event)
            case _:
                self._on_event(event)

    def _on_death(self, slot: Slot, message: str) -> None:
        if self._closing:
            return
        slot.ready = False
        victims, slot.jobs = list(slot.jobs.values()), {}
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - RESTART_WINDOW_SECONDS:
            self._deaths.popleft()
        if not self._was_ready:
            # It never loaded: trying again would only say the same more often.
            self._on_end(message)
        elif len(self._deaths) > self._max_restarts:
            self._on_end(f"the engine died {len(self._deaths)} times in ten minutes: {message}")
        else:
            self._restart_later(slot, message)
        self._on_change()
        self._on_crash(victims)

    def _restart_later(self, slot: Slot, message: str) -> None:
        doublings = len(self._deaths) - 1
        delay = min(FIRST_BACKOFF_SECONDS * 2.0**doublings, LONGEST_BACKOFF_SECONDS)
        log.warning("engine restarts", engine=slot.index, why=message, seconds=delay)

        def restart() -> None:
            self._restarts.discard(timer)
            self._observer.engine_restarted()
            self._start(slot)

        timer = asyncio.get_running_loop().call_later(delay, restart)
        self._restarts.add(timer)


def _row_steps(job: Job) -> int:
    return job.steps * job.rows_per_image * job.image_count
