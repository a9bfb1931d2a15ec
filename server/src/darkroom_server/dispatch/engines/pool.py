"""The engines: which are there, what is in them, and how a dead one comes back."""

import asyncio
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

import structlog

from darkroom_server.core.engine import Engine
from darkroom_server.core.events import EngineDied, EngineReady, Event
from darkroom_server.dispatch.engines.handle import Death, EngineHandle
from darkroom_server.dispatch.estimation.remaining_work import remaining_work
from darkroom_server.dispatch.estimation.simulation import forecast
from darkroom_server.dispatch.jobs.job import ActiveJob
from darkroom_server.dispatch.observer import Observer

log = structlog.get_logger(__name__)

FIRST_BACKOFF_SECONDS = 0.25
LONGEST_BACKOFF_SECONDS = 30.0
RESTART_WINDOW_SECONDS = 600.0
"""Deaths in this time are counted together."""


class EnginePool:
    """Starts the engines, restarts those that die, and chooses one for each job.

    ``on_event`` is told what engines say of jobs and of themselves, ``on_crash`` the jobs that
    were in an engine when it died, ``on_change`` that an engine came or went, and ``on_end`` that
    no engine will ever come back, with one line for the operator. All on the event loop.
    One that dies more than ``max_restarts`` times in ten minutes is given up, and at once one that
    says at its first start that it cannot load.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        *,
        max_resident_samples: int,
        max_restarts: int,
        observer: Observer,
        on_event: Callable[[Event], None],
        on_crash: Callable[[list[ActiveJob]], None],
        on_change: Callable[[], None],
        on_end: Callable[[str], None],
    ) -> None:
        self.slots = [EngineHandle(index, engine) for index, engine in enumerate(engines)]
        self.max_resident_samples = max_resident_samples
        self._max_restarts = max_restarts
        self._observer = observer
        self._on_event = on_event
        self._on_crash = on_crash
        self._on_change = on_change
        self._on_end = on_end
        self._closing = False
        self._restarts: set[asyncio.TimerHandle] = set()

    @property
    def ready(self) -> bool:
        """Whether an engine could take a job now."""
        return any(slot.ready for slot in self.slots)

    def start(self) -> None:
        """Let every engine load."""
        for slot in self.slots:
            self._start(slot)

    async def close(self) -> None:
        """Stop every engine; waits until they have."""
        self._closing = True
        for timer in self._restarts:
            timer.cancel()
        await asyncio.gather(*(asyncio.to_thread(slot.engine.close) for slot in self.slots))

    def choose(self, accepted: ActiveJob) -> EngineHandle | None:
        """The engine that would finish a job first, None where none has room for it.

        A job that may have killed an engine waits for one that is empty.
        """
        able = [slot for slot in self.slots if slot.ready and not slot.isolated]
        if accepted.crashes:
            able = [slot for slot in able if not slot.jobs]
        else:
            able = [slot for slot in able if slot.samples < self.max_resident_samples]
        if len(able) < 2:
            return able[0] if able else None
        work = remaining_work(accepted)

        def finish(slot: EngineHandle) -> tuple[float, int]:
            load = slot.load()
            told = forecast([load], [work], sys.maxsize)
            # Where it is as soon done in either, the one that is sooner empty.
            return told.finishes.get(work.id, 0.0), sum(sum(job.passes) for job in load.jobs)

        return min(able, key=finish)

    def hand_over(self, accepted: ActiveJob, slot: EngineHandle) -> None:
        """Give a job to an engine."""
        slot.take(accepted)

    def cancel(self, job_id: str) -> None:
        """Tell the engine that has this job to let it go."""
        for slot in self.slots:
            if job_id in slot.jobs:
                slot.engine.cancel(job_id)

    def extend(self, job_id: str, deadline: float | None) -> None:
        """Tell the engine that has this job of its new deadline."""
        for slot in self.slots:
            if job_id in slot.jobs:
                slot.engine.extend(job_id, deadline)

    def left(self, job_id: str) -> None:
        """Note that the engine that had this job has let it go."""
        for slot in self.slots:
            slot.left(job_id)

    def _start(self, slot: EngineHandle) -> None:
        loop = asyncio.get_running_loop()

        told: deque[Event] = deque()
        waking = False

        def emit(event: Event) -> None:
            # Events come in bursts, and to wake the loop takes longer than most of them.
            nonlocal waking
            told.append(event)
            if not waking:
                waking = True
                with suppress(RuntimeError):  # The loop is closed, and nobody is left to tell.
                    loop.call_soon_threadsafe(hear)

        def hear() -> None:
            nonlocal waking
            waking = False  # First, so that what is told from here on wakes the loop again.
            try:
                while told:
                    self._on_slot_event(slot, told.popleft())
            finally:
                if told:
                    loop.call_soon(hear)

        slot.engine.start(emit)

    def _on_slot_event(self, slot: EngineHandle, event: Event) -> None:
        slot.learn(event)
        match event:
            case EngineReady():
                slot.ready = slot.loaded = True
                self._on_event(event)
                self._on_change()
            case EngineDied():
                self._on_death(slot, event)
            case _:
                self._on_event(event)

    def _on_death(self, slot: EngineHandle, died: EngineDied) -> None:
        if self._closing:
            return
        victims = slot.lose()
        now = time.monotonic()
        slot.deaths.append(Death(now, attributed_to_job=_explained(slot, victims)))
        while slot.deaths[0].at < now - RESTART_WINDOW_SECONDS:
            slot.deaths.popleft()
        unexplained = sum(not death.attributed_to_job for death in slot.deaths)
        if died.fatal and not slot.loaded:
            self._give_up(slot, died.message)
        elif unexplained > self._max_restarts:
            often = f"the engine died {unexplained} times in ten minutes"
            self._give_up(slot, f"{often}: {died.message}")
        else:
            self._restart_later(slot, died.message)
        self._on_change()
        self._on_crash(victims)

    def _give_up(self, slot: EngineHandle, message: str) -> None:
        """Do without an engine; where it was the last, that is the end."""
        slot.given_up = True
        if all(each.given_up for each in self.slots):
            self._on_end(message)
            return
        log.error("engine given up", engine=slot.index, why=message)
        self._observer.engine_given_up()

    def _restart_later(self, slot: EngineHandle, message: str) -> None:
        doublings = len(slot.deaths) - 1
        delay = min(FIRST_BACKOFF_SECONDS * 2.0**doublings, LONGEST_BACKOFF_SECONDS)
        log.warning("engine restarts", engine=slot.index, why=message, seconds=delay)

        def restart() -> None:
            self._restarts.discard(timer)
            slot.restarts += 1
            self._observer.engine_restarted()
            try:
                self._start(slot)
            except (OSError, RuntimeError) as error:  # No memory, files or threads to spare.
                self._on_death(slot, EngineDied(f"the engine cannot be started: {error}"))

        timer = asyncio.get_running_loop().call_later(delay, restart)
        self._restarts.add(timer)


def _explained(slot: EngineHandle, victims: list[ActiveJob]) -> bool:
    """Whether an engine died of a job, so that it says nothing of the engine itself.

    That is one which was alone in it, and had been in another that died. Where the engine has
    finished nothing since the last such job, the engine is to blame after all.
    """
    if len(victims) != 1 or not (
        victims[0].crashes and victims[0].suspect and slot.healthy_since_crash
    ):
        return False
    slot.healthy_since_crash = False
    return True
