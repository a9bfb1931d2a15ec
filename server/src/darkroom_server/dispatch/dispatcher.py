"""Owns every accepted job, from admission to its end."""

import asyncio
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import structlog

from darkroom_server.core.caller import ANONYMOUS, Caller
from darkroom_server.core.engine import Engine
from darkroom_server.core.errors import StartupError
from darkroom_server.core.events import EngineReady, Event
from darkroom_server.core.job import Job
from darkroom_server.core.model import ModelInfo
from darkroom_server.dispatch.admission.availability import (
    Availability,
    QueueLimits,
    check_fits,
    going_away,
)
from darkroom_server.dispatch.admission.controller import AdmissionController
from darkroom_server.dispatch.engines.pool import EnginePool
from darkroom_server.dispatch.event_router import EventRouter
from darkroom_server.dispatch.jobs.estimate import Estimate
from darkroom_server.dispatch.jobs.job import ActiveJob
from darkroom_server.dispatch.jobs.outcomes import JobOutcome
from darkroom_server.dispatch.jobs.registry import JobRegistry
from darkroom_server.dispatch.lifecycle import JobLifecycle
from darkroom_server.dispatch.observer import NullObserver, Observer
from darkroom_server.dispatch.status import Snapshot, State, snapshot_of, state_of

log = structlog.get_logger(__name__)


class Dispatcher:
    """Admits jobs, keeps those that wait in order, and feeds the engines.

    All methods belong to one event loop. ``model_ids`` are the models the server was told to hold,
    in that order. ``max_queued_jobs`` and ``max_queued_megapixel_steps`` bound what waits. A job is
    handed over while fewer than ``max_resident_samples`` images are in an engine. With
    ``early_refusal`` jobs are refused that cannot be expected to meet their deadlines. An engine
    that dies more than ``max_restarts`` times in ten minutes is given up; the last one is the end.
    ``on_state`` is told of each change of ``state``, and now and then of none.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        model_ids: Iterable[str],
        *,
        max_queued_jobs: int,
        max_resident_samples: int,
        max_queued_megapixel_steps: float = math.inf,
        early_refusal: bool = True,
        max_restarts: int = 5,
        observer: Observer | None = None,
        on_state: Callable[[State], None] = lambda _: None,
    ) -> None:
        self._admission = Availability(model_ids)
        self._on_state = on_state
        self._observer = observer or NullObserver()
        self._roster = JobRegistry(self._observer)
        self._fleet = EnginePool(
            engines,
            max_resident_samples=max_resident_samples,
            max_restarts=max_restarts,
            observer=self._observer,
            on_event=self._on_event,
            on_crash=self._on_crash,
            on_change=self._on_change,
            on_end=self._on_end,
        )
        self._serial = itertools.count(1)
        limits = QueueLimits(jobs=max_queued_jobs, megapixel_steps=max_queued_megapixel_steps)
        self._gate = AdmissionController(
            self._fleet, self._roster, limits, early_refusal=early_refusal
        )
        self._passage = JobLifecycle(self._roster, self._fleet, self._gate, self._observer)
        self.counts = self._passage.counts
        self._reports = EventRouter(
            self._roster,
            self._observer,
            self._gate.estimates,
            on_leave=self._passage.left_engine,
            on_return=self._passage.came_back,
        )
        self._loaded = asyncio.Event()
        self._died = asyncio.Event()
        self._death: str | None = None

    # What is so.

    @property
    def models(self) -> dict[str, ModelInfo | None]:
        """Every model by id, None for those that are not loaded yet."""
        return dict(self._admission.models)

    @property
    def state(self) -> State:
        """Whether jobs are accepted, and drawn."""
        return state_of(self._admission, self._fleet)

    @property
    def ready(self) -> bool:
        """Whether jobs are accepted, and an engine is there to draw them."""
        return self.state is State.READY

    @property
    def max_jobs(self) -> int:
        """The most jobs that can be here at once: those that wait, and those in the engines."""
        return self._gate.limits.jobs + self._fleet.max_resident_samples * len(self._fleet.slots)

    @property
    def queued_jobs(self) -> int:
        """Jobs that wait for a place in the engine."""
        return self._roster.queued

    @property
    def running_jobs(self) -> int:
        """Jobs in the engine, those included that are about to leave it."""
        return self._roster.running

    def snapshot(self) -> Snapshot:
        """The whole, as it is now."""
        return snapshot_of(
            self._admission, self._roster, self._fleet, self.counts, self._gate.limits
        )

    # From start to end.

    def start(self) -> None:
        """Let the engines load; ``loaded`` waits for the first."""
        self._fleet.start()

    async def loaded(self) -> None:
        """Wait until the models are loaded; raises ``StartupError`` where they cannot be."""
        await self._loaded.wait()
        if self._death is not None:
            raise StartupError(self._death)

    async def died(self) -> str:
        """Wait until no engine will come back, and say why; for ever if that never happens."""
        await self._died.wait()
        return self._death or ""

    def refuse_new_jobs(self) -> None:
        """Refuse new jobs from now on, because the server is going away."""
        self._admission.drain()
        self._on_change()

    async def drain(self, grace: float) -> None:
        """Refuse new jobs, and let accepted ones finish for ``grace`` seconds at most.

        Those that have not finished by then fail with ``NotReady``.
        """
        self.refuse_new_jobs()
        try:
            async with asyncio.timeout(grace):
                await self._passage.idle.wait()
        except TimeoutError:
            log.warning("drain ends jobs unfinished", jobs=self.counts.live, grace=grace)
        self._passage.withdraw_all(JobOutcome.FAILED, going_away())

    async def close(self) -> None:
        """End what is left, and the engines; waits until they have stopped."""
        await self.drain(0.0)
        self._passage.close()
        await self._fleet.close()

    # What callers want.

    def model(self, model_id: str) -> ModelInfo:
        """The loaded model ``model_id``; raises ``UnknownModel`` or ``NotReady``."""
        return self._admission.model(model_id)

    def new_job_id(self, request_id: str) -> str:
        """An id for a job: the request's own, unless a job that is still here has it.

        That one may be another caller's, or on its way out of the engine.
        """
        return f"{request_id}~{next(self._serial)}" if request_id in self._roster else request_id

    def estimate(self, job: Job) -> Estimate | None:
        """What ``job`` would take if it came now; None while too little is known.

        Raises ``UnknownModel``, ``NotReady`` or ``TooLarge``.
        """
        model = self._admission.model(job.model)
        check_fits(job, model)
        return self._gate.estimates.of(ActiveJob(job, model, lambda _: None))

    def submit(self, job: Job, caller: Caller = ANONYMOUS) -> ActiveJob:
        """Accept ``job`` of ``caller``, whose id must be unused.

        Raises ``UnknownModel``, ``NotReady``, ``TooLarge``, ``DeadlineExceeded``, ``QuotaExceeded``
        or ``QueueFull``.
        """
        model = self._admission.model(job.model)
        check_fits(job, model)
        if job.id in self._roster:
            raise ValueError(f"a job of id {job.id!r} is still here")
        accepted = ActiveJob(job, model, self._passage.abandon)
        self._gate.let_in(accepted, caller)
        self._passage.enter(accepted)
        return accepted

    def cancel(self, job_id: str) -> None:
        """Give a job up, wherever it is and whoever waits; unknown and ended ones are ignored."""
        self._passage.cancel(job_id)

    def join(self, accepted: ActiveJob, deadline: float | None) -> None:
        """Another call wants the same job, until ``deadline``; the later one counts, None most."""
        self._observer.retry_joined(accepted.job.model)
        self._passage.extend(accepted, deadline)

    # What the engine tells.

    def _on_event(self, event: Event) -> None:
        match event:
            case EngineReady(models):
                self._admission.loaded(models)
                self._observer.loaded(event)
                self._loaded.set()
                self._passage.feed()
            case _:
                self._reports.hear(event)

    def _on_change(self) -> None:
        """An engine came or went, or the server goes away."""
        self._observer.ready(self.ready)
        self._on_state(self.state)

    def _on_crash(self, victims: list[ActiveJob]) -> None:
        self._passage.crashed(victims, last=self._death is not None)

    def _on_end(self, message: str) -> None:
        self._death = message
        self._admission.died()
        self._loaded.set()
        self._died.set()
        self._passage.no_engine_left()
