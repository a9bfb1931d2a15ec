"""Owns every accepted job, from its admission to its end."""

import asyncio
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import structlog

from darkroom_server.core.adapter_places import AdapterPlaces
from darkroom_server.core.caller import ANONYMOUS, Caller
from darkroom_server.core.engine import Engine
from darkroom_server.core.errors import StartupError
from darkroom_server.core.job import Job
from darkroom_server.core.model import ModelInfo
from darkroom_server.core.model_places import ModelsFolder
from darkroom_server.dispatch.adapter_catalog import AdapterCatalog
from darkroom_server.dispatch.admission.availability import Availability, State, shutting_down
from darkroom_server.dispatch.admission.controller import AdmissionController
from darkroom_server.dispatch.admission.limits import QueueLimits
from darkroom_server.dispatch.engines.pool import EnginePool
from darkroom_server.dispatch.estimation.estimate import Estimate
from darkroom_server.dispatch.estimation.estimator import Estimator
from darkroom_server.dispatch.estimation.load_times import LoadTimes
from darkroom_server.dispatch.event_router import EventRouter
from darkroom_server.dispatch.jobs.job import ActiveJob
from darkroom_server.dispatch.jobs.registry import JobRegistry
from darkroom_server.dispatch.lifecycle import JobLifecycle
from darkroom_server.dispatch.models.catalog import ModelCatalog
from darkroom_server.dispatch.observer import Observer, RetryJoined
from darkroom_server.dispatch.status import Snapshot, snapshot_of

log = structlog.get_logger(__name__)


class Dispatcher:
    """Admits jobs, keeps the waiting ones in order, and feeds the engines.

    All methods belong to one event loop. ``model_ids``: the configured models, in their order.
    ``max_queued_jobs`` and ``max_queued_megapixel_steps`` limit what waits, ``max_input_bytes`` the
    decoded images that all jobs hold. An engine takes jobs
    while fewer than ``max_resident_samples`` images are in it. With ``early_refusal``, jobs that
    are not expected to meet their deadlines are rejected. An engine that dies more than
    ``max_restarts`` times in ten minutes is retired. ``on_state`` is called with the state when it
    may have changed. ``availability``: the models and the state. ``adapter_places``: what can be
    added to the adapters on offer, with ``adapters``. ``pinned_models`` are loaded at start and
    stay; ``device_memory_budget`` bounds the weights in each engine, ``host_memory_budget`` what
    the host's memory keeps of them, and ``swap_wait`` the seconds until the model of a waiting job
    is loaded, see ``models``; ``model_locations`` are their paths and hub ids, ``models_folder`` is
    where more of them appear.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        model_ids: Iterable[str],
        *,
        max_queued_jobs: int,
        max_resident_samples: int,
        max_queued_megapixel_steps: float = math.inf,
        max_input_bytes: int = sys.maxsize,
        early_refusal: bool = True,
        max_restarts: int = 5,
        observer: Observer | None = None,
        on_state: Callable[[State], None] = lambda _: None,
        load_times: LoadTimes | None = None,
        adapter_places: AdapterPlaces | None = None,
        pinned_models: Iterable[str] = (),
        device_memory_budget: int | None = None,
        host_memory_budget: int | None = None,
        model_locations: Mapping[str, str] | None = None,
        swap_wait: float = 30.0,
        models_folder: ModelsFolder | None = None,
    ) -> None:
        self._observer = observer or Observer()
        self._registry = JobRegistry()
        self._pool = EnginePool(
            engines,
            max_resident_samples=max_resident_samples,
            max_restarts=max_restarts,
            observer=self._observer,
        )
        self._load_times = load_times or LoadTimes()
        self.availability = Availability(
            model_ids, self._pool, self._observer, on_state, self._load_times
        )
        self.models = ModelCatalog(
            self.availability,
            self._pool,
            self._registry,
            self._observer,
            pinned=frozenset(pinned_models),
            budget=device_memory_budget,
            host_budget=host_memory_budget,
            locations=model_locations or {},
            swap_wait=swap_wait,
            folder=models_folder,
        )
        estimator = Estimator(self._pool, self._registry, self.models)
        self._admission = AdmissionController(
            self.availability,
            estimator,
            self._pool,
            self._registry,
            QueueLimits(
                jobs=max_queued_jobs,
                megapixel_steps=max_queued_megapixel_steps,
                input_bytes=max_input_bytes,
            ),
            early_refusal=early_refusal,
        )
        self._lifecycle = JobLifecycle(
            self._registry, self._pool, self._admission, estimator, self._observer, self.models
        )
        self.adapters = AdapterCatalog(
            adapter_places or AdapterPlaces(), self.availability, self._pool, self._registry
        )
        self._router = EventRouter(
            self.availability,
            self._pool,
            self._lifecycle,
            self.adapters,
            self.models,
            self._observer,
        )
        self._serial = itertools.count(1)
        self.counts = self._lifecycle.counts
        self.backlog = self._lifecycle.backlog

    # State.

    @property
    def ready(self) -> bool:
        """Jobs are accepted, and an engine can run them."""
        return self.availability.state is State.READY

    @property
    def max_jobs(self) -> int:
        """The most jobs that can be here at once: waiting, and in the engines."""
        resident = self._pool.max_resident_samples * len(self._pool.engines)
        return self._admission.limits.jobs + resident

    @property
    def max_queued_jobs(self) -> int:
        """The most jobs that may wait here."""
        return self._admission.limits.jobs

    @property
    def queued_jobs(self) -> int:
        """The number of waiting jobs."""
        return self._registry.queued

    @property
    def running_jobs(self) -> int:
        """The number of jobs in engines, including those about to be removed."""
        return self._registry.running

    @property
    def places(self) -> int:
        """How many images of the ledger's jobs may come: as many as the engines take now.

        While jobs wait here, a single job may come and wait with them, so that their order decides.
        """
        waiting = self._registry.queue()
        if not waiting:
            return self._pool.places
        return int(all(active.entry is None for active in waiting))

    def has_room(self, job: Job, model: ModelInfo) -> bool:
        """Whether ``job`` would go to an engine at once."""
        return not self._registry.queued and self._pool.has_room(ActiveJob(job, model))

    def on_room(self, wake: Callable[[], object] | None) -> None:
        """Call ``wake`` whenever a job has left, None: nothing."""
        self._lifecycle.on_room = wake or (lambda: None)

    def job_counts(self, model: str) -> tuple[int, int]:
        """The waiting and the running jobs of ``model``."""
        return self._registry.counts(model)

    def snapshot(self) -> Snapshot:
        """The status for operators."""
        return snapshot_of(
            self.availability,
            self._registry,
            self._pool,
            self.counts,
            self._admission.limits,
            self.models.status,
        )

    # Start and stop.

    def start(self) -> None:
        """Let the engines load; ``loaded`` waits for the first."""
        self._load_times.begin()
        self.models.report()
        self._pool.start(self._router.route)

    async def loaded(self) -> None:
        """Wait until the models are loaded; raises ``StartupError`` if they cannot be."""
        if failure := await self.availability.loaded():
            raise StartupError(failure)

    def refuse_new_jobs(self) -> None:
        """Reject new jobs from now on: the server shuts down."""
        self.availability.set_draining()
        self.availability.report()

    async def drain(self, grace: float) -> None:
        """Reject new jobs, and let accepted ones finish for at most ``grace`` seconds.

        Jobs that have not finished by then fail with ``NotReady``.
        """
        self.refuse_new_jobs()
        try:
            async with asyncio.timeout(grace):
                await self._lifecycle.idle.wait()
        except TimeoutError:
            log.warning("drain ends jobs unfinished", jobs=self.counts.live, grace=grace)
        self._lifecycle.end_all(shutting_down())

    async def close(self) -> None:
        """End all jobs and the engines; waits until the engines have stopped."""
        await self.drain(0.0)
        await self._pool.close()

    # Models.

    async def load_model(self, id: str) -> None:
        """Load a model of the catalogue, and wait until it is in memory.

        One whose files have changed is read again once the jobs in the engines have ended. The load
        goes on if the caller stops to wait. Raises ``UnknownModel``, ``ModelUnusable``,
        ``ModelMemory`` or ``NotReady``.
        """
        if self.availability.state is State.DRAINING:
            raise shutting_down()
        await self.models.look_at_files()
        done = self.models.want(id)
        self._lifecycle.feed()
        await done

    def unload_model(self, id: str) -> int:
        """Unpin a model, and unload it once no job uses it; returns the number of those jobs.

        Raises ``UnknownModel``.
        """
        jobs = self.models.unload(id)
        self._lifecycle.feed()
        return jobs

    async def pin_model(self, id: str, *, pinned: bool) -> None:
        """Load a model and keep it in memory, or let it be unloaded again.

        Raises what ``load_model`` raises.
        """
        if pinned:
            await self.load_model(id)
        self.models.set_pinned(id, pinned=pinned)

    # Jobs.

    def estimate(self, job: Job) -> Estimate | None:
        """How long ``job`` would take if it came now; None while too little is known.

        Raises ``UnknownModel``, ``NotReady`` or ``TooLarge``.
        """
        return self._admission.estimate(job)

    def submit(self, job: Job, caller: Caller = ANONYMOUS) -> ActiveJob:
        """Accept ``job`` of ``caller``. If its id is in use, the job gets a new one.

        Raises ``UnknownModel``, ``NotReady``, ``TooLarge``, ``DeadlineExceeded``,
        ``QuotaExceeded`` or ``QueueFull``.
        """
        active = self._admission.admit(self._with_unused_id(job), caller)
        self._lifecycle.enter(active)
        return active

    def check(self, job: Job, caller: Caller) -> ActiveJob:
        """``job`` as it would be accepted; another server may get it, so it does not enter here.

        Raises what ``submit`` raises.
        """
        active = self._admission.admit(job, caller)
        self._admission.release(active)
        return active

    def resubmit(self, job: Job, model: ModelInfo, caller: Caller, losses: int) -> ActiveJob:
        """Accept ``job`` again, which an earlier server of the ledger had accepted.

        ``losses``: servers that died while they ran it. Raises ``TooLarge``.
        """
        active = self._admission.readmit(self._with_unused_id(job), model, caller, losses)
        self._lifecycle.enter(active)
        return active

    def _with_unused_id(self, job: Job) -> Job:
        if job.id not in self._registry:
            return job
        # Another caller's, or one that ended and that its engine has not removed yet.
        return replace(job, id=f"{job.id}~{next(self._serial)}")

    def hand_over(self, active: ActiveJob) -> None:
        """End a job here that another server has by now; ignored if it has ended."""
        self._lifecycle.hand_over(active)

    def cancel(self, job_id: str) -> None:
        """Cancel a job, even if calls follow it; unknown and ended ones are ignored."""
        self._lifecycle.cancel(job_id)

    def join(self, active: ActiveJob, deadline: float | None) -> None:
        """Another call wants the same job until ``deadline``; the latest counts, None above all."""
        self._observer.on_event(RetryJoined(active.job.model))
        self._lifecycle.extend(active, deadline)
