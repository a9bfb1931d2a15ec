"""The engine pool: starts engines, restarts those that die, and chooses one for each job."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

import structlog

from darkroom_server.core.engine import Engine
from darkroom_server.core.events import EngineDied, Event
from darkroom_server.core.exhaustion import is_exhaustion
from darkroom_server.dispatch.engines.free_rows import FreeRows
from darkroom_server.dispatch.engines.handle import Death, EngineHandle
from darkroom_server.dispatch.estimation.remaining_work import remaining_work
from darkroom_server.dispatch.jobs.job import CRASH_SUSPECT, ActiveJob
from darkroom_server.dispatch.observer import EngineRestarted, EngineRetired, Observer

log = structlog.get_logger(__name__)

FIRST_BACKOFF_SECONDS = 0.25
LONGEST_BACKOFF_SECONDS = 30.0
RESTART_WINDOW_SECONDS = 600.0
"""Deaths within this time are counted together."""

Route = Callable[[EngineHandle, "deque[Event]"], None]
"""Handles the events of an engine, on the event loop, and removes them."""


class EnginePool:
    """All engines; a job enters one while fewer than ``max_resident_samples`` images are in it.

    What the job's images hold between batches must fit the engine's memory, beside the others.
    An engine that dies more than ``max_restarts`` times in ten minutes is retired, and so is, at
    once, one that reports at its first start that it cannot load. A start that fails because the
    machine has no descriptors, processes or memory to give is not a death: it is tried again.
    ``exhausted``: why no engine will come back, one line for the operator; "" while one may.
    ``models_wanted``: models are to be loaded or unloaded though no job waits for that.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        *,
        max_resident_samples: int,
        max_restarts: int,
        observer: Observer,
    ) -> None:
        self.engines = [EngineHandle(index, engine) for index, engine in enumerate(engines)]
        self.max_resident_samples = max_resident_samples
        self.exhausted = ""
        self.models_wanted = False
        self._max_restarts = max_restarts
        self._observer = observer
        self._closing = False
        self._route: Route = lambda _, events: events.clear()
        self._restarts: set[asyncio.TimerHandle] = set()

    @property
    def ready(self) -> bool:
        """Whether an engine can run jobs now."""
        return any(engine.ready for engine in self.engines)

    @property
    def held(self) -> set[str]:
        """The models whose jobs an engine takes, once it has room."""
        return {id for engine in self.engines for id in engine.models if engine.holds(id)}

    @property
    def places(self) -> int:
        """How many more images the engines that run take."""
        most = self.max_resident_samples
        return sum(max(0, most - engine.samples) for engine in self.engines if engine.ready)

    def has_room(self, active: ActiveJob) -> bool:
        """Whether an engine would take a new job now."""
        most = self.max_resident_samples
        return any(engine.has_room(most, active) for engine in self.engines)

    def has_room_later(self, active: ActiveJob) -> bool:
        """Whether an engine would take a job now if no jobs of other models ran there."""
        most = self.max_resident_samples
        return not active.crashes and any(
            engine.has_room_later(most, active) for engine in self.engines
        )

    def free_rows(self) -> FreeRows:
        """The rows that are free in the batches that run now, until a job enters an engine."""
        return FreeRows(engine.free_rows() for engine in self.engines)

    def start(self, route: Route) -> None:
        """Let every engine load; ``route`` handles their events."""
        self._route = route
        for engine in self.engines:
            self._try_start(engine)

    async def close(self) -> None:
        """Stop every engine, and wait until they have stopped."""
        self._closing = True
        for timer in self._restarts:
            timer.cancel()
        await asyncio.gather(*(asyncio.to_thread(each.engine.close) for each in self.engines))

    def choose(self, active: ActiveJob) -> EngineHandle | None:
        """The engine that would finish a job first, None if none has room.

        Of a job that enters at once its estimate says which. A job that may have killed an engine
        gets an empty one.
        """
        most, estimate = self.max_resident_samples, active.estimate
        if active.crashes:
            model = active.job.model
            able = [each for each in self.engines if each.holds(model) and not each.jobs]
        else:
            if estimate is not None and estimate.engine is not None:
                chosen = self.engines[estimate.engine]
                if chosen.has_room(most, active):
                    return chosen
            able = [engine for engine in self.engines if engine.has_room(most, active)]
        if len(able) < 2:
            return able[0] if able else None
        work = remaining_work(active)
        return min(able, key=lambda engine: engine.finish_seconds(work))

    def handle_death(
        self, engine: EngineHandle, died: EngineDied, *, by_load: bool = False
    ) -> list[ActiveJob] | None:
        """Restart a dead engine later, or retire it; returns the jobs that were in it.

        ``by_load``: it died while it loaded a model, which is the cause. None if the pool is
        closing: the jobs were ended before.
        """
        if self._closing:
            return None
        jobs = engine.set_dead()
        if died.exhausted:
            engine.starts_without_resources += 1
            self._restart_later(engine, died.message)
            return jobs
        engine.starts_without_resources = 0
        now = time.monotonic()
        explained = by_load or _is_attributed_to_job(engine, jobs)
        engine.deaths.append(Death(now, explained=explained))
        while engine.deaths[0].at < now - RESTART_WINDOW_SECONDS:
            engine.deaths.popleft()
        own = sum(not death.explained for death in engine.deaths)
        if died.fatal and not engine.loaded:
            self._retire(engine, died.message)
        elif own > self._max_restarts:
            self._retire(engine, f"the engine died {own} times in ten minutes: {died.message}")
        else:
            self._restart_later(engine, died.message)
        return jobs

    def _start(self, engine: EngineHandle) -> None:
        loop = asyncio.get_running_loop()
        pending: deque[Event] = deque()
        scheduled = False

        def emit(event: Event) -> None:
            # Called on the engine's threads. Events come in bursts, and waking the loop costs more
            # than handling most of them.
            nonlocal scheduled
            pending.append(event)
            if not scheduled:
                scheduled = True
                with suppress(RuntimeError):  # The loop is closed.
                    loop.call_soon_threadsafe(drain)

        def drain() -> None:
            nonlocal scheduled
            scheduled = False  # First, so that later events schedule the next drain.
            try:
                self._route(engine, pending)
            finally:
                if pending:
                    loop.call_soon(drain)

        engine.engine.start(emit)

    def _try_start(self, engine: EngineHandle) -> None:
        try:
            self._start(engine)
        except (OSError, RuntimeError) as error:
            died = EngineDied(
                f"the engine cannot be started: {error}", exhausted=is_exhaustion(error)
            )
            self._route(engine, deque([died]))

    def _retire(self, engine: EngineHandle, message: str) -> None:
        engine.retired = True
        if all(each.retired for each in self.engines):
            self.exhausted = message
            return
        log.error("engine retired", engine=engine.index, why=message)
        self._observer.on_event(EngineRetired())

    def _restart_later(self, engine: EngineHandle, message: str) -> None:
        tries = len(engine.deaths) + engine.starts_without_resources
        delay = min(FIRST_BACKOFF_SECONDS * 2.0 ** (tries - 1), LONGEST_BACKOFF_SECONDS)
        log.warning("engine restarts", engine=engine.index, why=message, seconds=delay)

        def restart() -> None:
            self._restarts.discard(timer)
            engine.restarts += 1
            self._observer.on_event(EngineRestarted())
            self._try_start(engine)

        timer = asyncio.get_running_loop().call_later(delay, restart)
        self._restarts.add(timer)


def _is_attributed_to_job(engine: EngineHandle, jobs: list[ActiveJob]) -> bool:
    """Whether a poison job explains the death, so that it does not count against the engine.

    That is a job that was alone in the engine, and had been in another one that died. If the engine
    has finished nothing since the last such job, the engine itself is the cause.
    """
    if len(jobs) != 1 or not engine.healthy_since_crash:
        return False
    (job,) = jobs
    if not job.crashes or job.state not in CRASH_SUSPECT:
        return False
    engine.healthy_since_crash = False
    return True
