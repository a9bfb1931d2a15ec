"""Which model is loaded next, into which engine, and what makes room for it."""

import heapq
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from darkroom_server.core.errors import DarkroomError, ModelMemory
from darkroom_server.dispatch.admission.availability import Availability, State
from darkroom_server.dispatch.engines.handle import EngineHandle
from darkroom_server.dispatch.engines.pool import EnginePool
from darkroom_server.dispatch.jobs.job import ActiveJob
from darkroom_server.dispatch.jobs.registry import JobRegistry
from darkroom_server.dispatch.models.reads import ReadPlanner
from darkroom_server.dispatch.models.residency import Resident
from darkroom_server.dispatch.models.states import ModelStates
from darkroom_server.dispatch.models.swaps import (
    EngineView,
    Swap,
    SwapPolicy,
    Wanted,
    find_room,
    in_turn,
    plan_swaps,
)

RUN_MARGIN = 1.5
"""A job with a deadline should be in the engine by this multiple of its run time before that."""


@dataclass(slots=True)
class Planned:
    """What ``LoadPlanner.plan`` found out.

    ``freed``: jobs may enter an engine that could not before. ``unusable``: the models whose jobs
    cannot run, and why. ``again_at``: when to plan again if nothing happens.
    """

    freed: bool = False
    unusable: dict[str, DarkroomError] = field(default_factory=dict)
    again_at: float = math.inf


@dataclass(slots=True)
class WaitingJobs:
    """The jobs of one model in the queue: see ``Wanted``; the longest runs ``run_seconds``."""

    jobs: int = 0
    since: float = math.inf
    due: float = math.inf
    run_seconds: float = 0.0

    def add(self, since: float, due: float, run_seconds: float = 0.0) -> None:
        """Count one more."""
        self.jobs += 1
        # ``min`` and ``max`` take three times as long: every plan counts every waiting job.
        if since < self.since:
            self.since = since
        if due < self.due:
            self.due = due
        if run_seconds > self.run_seconds:
            self.run_seconds = run_seconds


NO_JOBS: Mapping[str, WaitingJobs] = MappingProxyType({})


class LoadPlanner:
    """Begins loads and evictions.

    An engine loads one model at a time: first those that an admin asked for, then those that the
    ``SwapPolicy`` chooses for the waiting jobs. Beside that it reads one into the host's memory.
    ``budget``: see ``ModelCatalog``. ``swap_wait``: seconds after which a load must have been made
    for a waiting job.
    """

    def __init__(
        self,
        states: ModelStates,
        availability: Availability,
        pool: EnginePool,
        registry: JobRegistry,
        budget: int | None,
        swap_wait: float,
    ) -> None:
        self._states = states
        self._availability = availability
        self._pool = pool
        self._registry = registry
        self._budget = budget
        self._swap_wait = swap_wait
        self._policy = SwapPolicy()
        self._reads = ReadPlanner(states, self._policy)

    def plan(self) -> Planned:
        """Unload what is wanted no more, and begin the loads that are due or pay."""
        planned = Planned()
        ready = [engine for engine in self._pool.engines if engine.ready]
        before = [engine.leaving for engine in ready]
        for engine in ready:
            engine.leaving = set()
        self._unload_unused(ready)
        self._unload_changed(ready)
        self._states.settle_resident()
        if self._availability.state is not State.DRAINING or self._registry.queued:
            self._begin_loads(ready, planned)
        planned.freed = any(old - engine.leaving for old, engine in zip(before, ready, strict=True))
        self._pool.models_wanted = bool(
            self._states.wanted or self._states.to_unload or self._states.to_reload
        )
        return planned

    def _begin_loads(self, ready: list[EngineHandle], planned: Planned) -> None:
        queue = self._waiting()
        views = self._views(ready, queue)
        wanted = self._reads.begin(self._wanted(queue), ready, views)
        plan = plan_swaps(self._policy, wanted, views, time.monotonic())
        for index, engine in enumerate(ready):
            swap = plan.swaps.get(index)
            engine.making_room_for = ""
            if swap is not None:
                self._begin(engine, swap)
        for each in plan.too_large:
            error = ModelMemory(each.id, self._why_no_room(each.bytes))
            self._states.settle(self._states.entries[each.id], error)
            planned.unusable[each.id] = error
        planned.again_at = plan.again_at

    def forecast(self, new: ActiveJob | None) -> dict[str, float]:
        """Seconds until each model is loaded that jobs wait for, ``new`` among them.

        Models that an engine loads now are there too. A new job with a deadline has its model
        loaded as early as it must be.
        """
        now = time.monotonic()
        queue = self._waiting()
        if new is not None:
            bound = self._swap_wait if new.job.deadline is None else 0.0
            queue.setdefault(new.job.model, WaitingJobs()).add(now, now + bound)
        loaded: dict[str, float] = {}
        read: dict[str, float] = {}
        free: list[float] = []
        free_to_read: list[float] = []
        for engine in self._pool.engines:
            remaining, until_read = self._load_ends_in(engine), 0.0
            if (loading := engine.loading) is not None:
                loaded[loading.model] = remaining
            if (reading := engine.reading) is not None:
                until_read = max(0.0, reading.began + self._read_seconds(reading.model) - now)
                read[reading.model] = until_read
            heapq.heappush(free, remaining)
            heapq.heappush(free_to_read, until_read)
        ready = [engine for engine in self._pool.engines if engine.ready]
        views = dict(enumerate(self._views(ready, queue)))
        due, others = self._policy.order(self._wanted(queue), now)
        for each, is_due in in_turn(due, others):
            seconds = each.load_seconds
            if ready and all(self._reads.reads_first(engine, each.id) for engine in ready):
                before = self._read_seconds(each.id)
                seconds -= before
                if each.id not in read:
                    read[each.id] = free_to_read[0] + before
                    heapq.heapreplace(free_to_read, read[each.id])
            found = find_room(self._policy, each, views, due=is_due)
            in_host_at = read.get(each.id, 0.0)
            if found is None and not is_due:
                # It waits until it is due, and others are loaded before.
                loaded[each.id] = max(max(free[0], in_host_at) + seconds, each.due - now)
                continue
            drain = found[1].room.drain_seconds if found is not None else 0.0
            loaded[each.id] = max(free[0] + drain, in_host_at) + seconds
            heapq.heapreplace(free, free[0] + drain + seconds)
        return loaded

    def _views(
        self, ready: Sequence[EngineHandle], queue: Mapping[str, WaitingJobs]
    ) -> list[EngineView]:
        """What the policy needs to know of the engines."""
        return [
            EngineView(
                budget=engine.weight_budget(self._budget) - self._coming_bytes(engine),
                residents=self.residents(engine, queue),
                loading=engine.loading is not None,
                free_in=self._load_ends_in(engine),
                making_room_for=engine.making_room_for,
                samples=engine.samples,
                full=self._is_full(engine),
            )
            for engine in ready
        ]

    def _coming_bytes(self, engine: EngineHandle) -> int:
        """The bytes of the model that an engine loads now."""
        if engine.loading is None:
            return 0
        return self._states.entries[engine.loading.model].weight_bytes

    def _load_ends_in(self, engine: EngineHandle) -> float:
        """The seconds that the load of an engine probably takes from now on."""
        if (loading := engine.loading) is None:
            return 0.0
        return max(0.0, loading.began + self._load_seconds(loading.model) - time.monotonic())

    def residents(
        self, engine: EngineHandle, queue: Mapping[str, WaitingJobs] = NO_JOBS
    ) -> list[Resident]:
        """The models in an engine's memory; ``queue``: the waiting jobs by model."""
        jobs = Counter(active.job.model for active in engine.jobs.values())
        drain = engine.drain_seconds()
        queued = {id: queue.get(id, WaitingJobs()) for id in engine.weights}
        copies = Counter(id for each in self._pool.engines if each.ready for id in each.weights)
        return [
            Resident(
                id=id,
                bytes=size,
                shared=engine.shared_of(id),
                pinned=self._states.entries[id].pinned,
                busy=jobs[id] > 0,
                drain_seconds=drain.get(id, 0.0),
                queued=queued[id].jobs,
                due=queued[id].due,
                load_seconds=self._load_seconds(id),
                rate=self._registry.rate(id) / max(1, copies[id]),
                last_used=self._registry.last_used.get(id, 0.0),
            )
            for id, size in engine.weights.items()
        ]

    def _begin(self, engine: EngineHandle, swap: Swap) -> None:
        """Load a model, or let others make room for it first."""
        if swap.room.drain:
            engine.leaving |= set(swap.room.drain)
            engine.making_room_for = swap.model
            return
        for evicted in swap.room.evict:
            self._states.evict(engine, evicted, swap.model)
        self._states.begin_load(engine, swap.model)

    def _waiting(self) -> dict[str, WaitingJobs]:
        """The queue by model."""
        found: defaultdict[str, WaitingJobs] = defaultdict(WaitingJobs)
        for active in self._registry.waiting():
            job, estimate = active.job, active.estimate
            run = estimate.run_time if estimate is not None else 0.0
            due = job.submitted_at + self._swap_wait / 2.0**job.priority
            if job.deadline is not None:
                due = min(due, job.deadline - RUN_MARGIN * run)
            found[job.model].add(job.submitted_at, due, run)
        return dict(found)

    def _wanted(self, waiting: Mapping[str, WaitingJobs]) -> list[Wanted]:
        """The models to load: those that an admin wants, and those that jobs wait for.

        Those of an engine that is full are among them, for another engine.
        """
        ready = [engine for engine in self._pool.engines if engine.ready]
        present: defaultdict[str, set[int]] = defaultdict(set)
        for index, engine in enumerate(ready):
            for id in (*engine.models, *([engine.loading.model] if engine.loading else [])):
                present[id].add(index)
        # As many models as can make room load and run side by side.
        places = sum(
            not self._states.entries[id].pinned for engine in ready for id in engine.models
        )
        found = []
        for id in dict.fromkeys((*self._states.wanted, *waiting)):
            held_by = frozenset(present[id])
            if id in self._availability.failures or len(held_by) == max(1, len(ready)):
                continue
            jobs = waiting.get(id, WaitingJobs())
            full = jobs.jobs and all(self._is_full(ready[i]) for i in held_by)
            if held_by and (not full or self._states.entries[id].copies_fail):
                continue
            due = -math.inf if id in self._states.wanted else jobs.due
            load = self._load_seconds(id)
            found.append(
                Wanted(
                    id=id,
                    bytes=self._states.entries[id].weight_bytes,
                    shared=self._states.entries[id].shared,
                    load_seconds=load,
                    turn_seconds=(load + jobs.run_seconds) / max(1, places),
                    jobs=jobs.jobs,
                    rate=self._registry.rate(id),
                    since=jobs.since,
                    due=math.inf if held_by else due,
                    held_by=held_by,
                )
            )
        return found

    def _is_full(self, engine: EngineHandle) -> bool:
        return engine.samples >= self._pool.max_resident_samples

    def _load_seconds(self, id: str) -> float:
        """What it probably takes to bring a model into memory."""
        return self._states.load_seconds(id)

    def _read_seconds(self, id: str) -> float:
        """What it probably takes to read a model into the host's memory, before it is copied."""
        entry, pace = self._states.entries[id], self._states.pace
        return max(0.0, pace.expected(entry) - pace.expected(entry, in_host=True))

    def _unload_unused(self, ready: Iterable[EngineHandle]) -> None:
        loading = {each.model for engine in self._pool.engines for each in engine.in_progress}
        for id in self._states.to_unload - loading:
            if any(self._registry.counts(id)):
                continue
            self._states.to_unload.discard(id)
            for engine in ready:
                if id in engine.models:
                    engine.remove_model(id)
                elif id in engine.host:
                    engine.drop_from_host(id)
            self._states.report(id)

    def _unload_changed(self, ready: Iterable[EngineHandle]) -> None:
        """Unload the models that are to be read again, once their jobs in the engine have ended.

        They get no new ones until then.
        """
        for id in self._states.to_reload.copy():
            holding = [engine for engine in ready if id in engine.models]
            for engine in holding:
                if any(active.job.model == id for active in engine.jobs.values()):
                    engine.leaving.add(id)
                else:
                    engine.remove_model(id)
            if not any(id in engine.models for engine in holding):
                self._states.to_reload.discard(id)
                self._states.want(id)
                self._states.report(id)

    def _why_no_room(self, bytes: int) -> str:
        budget = max(engine.weight_budget(self._budget) for engine in self._pool.engines)
        pinned = [id for id, each in self._states.entries.items() if each.pinned]
        stay = f", of which {', '.join(pinned)} must stay" if pinned else ""
        return (
            f"its weights need {bytes} bytes, and models may have {budget:.0f}{stay}; "
            "unpin one, or raise --device-memory-budget"
        )
