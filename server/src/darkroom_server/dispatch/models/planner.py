"""Which model is loaded next, into which engine, and what makes room for it."""

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from darkroom_server.core.errors import DarkroomError, ModelMemory
from darkroom_server.dispatch.admission.availability import Availability, State
from darkroom_server.dispatch.engines.handle import EngineHandle, ModelLoading
from darkroom_server.dispatch.engines.pool import EnginePool
from darkroom_server.dispatch.jobs.registry import JobRegistry
from darkroom_server.dispatch.models.entry import CatalogEntry
from darkroom_server.dispatch.models.residency import Resident, Room, make_room
from darkroom_server.dispatch.models.states import ModelStates


@dataclass(slots=True)
class Planned:
    """What ``LoadPlanner.plan`` found out.

    ``freed``: jobs may enter an engine that could not before. ``unusable``: the models whose jobs
    cannot run, and why.
    """

    freed: bool = False
    unusable: dict[str, DarkroomError] = field(default_factory=dict)


class LoadPlanner:
    """Begins loads and evictions.

    An engine loads one model at a time: first those that an admin asked for, then those of the
    waiting jobs, the most urgent first. ``budget``: see ``ModelCatalog``.
    """

    def __init__(
        self,
        states: ModelStates,
        availability: Availability,
        pool: EnginePool,
        registry: JobRegistry,
        budget: int | None,
    ) -> None:
        self._states = states
        self._availability = availability
        self._pool = pool
        self._registry = registry
        self._budget = budget

    def plan(self) -> Planned:
        """Unload what is wanted no more, and begin the loads that fit, the most urgent first."""
        planned = Planned()
        ready = [engine for engine in self._pool.engines if engine.ready]
        before = [engine.leaving for engine in ready]
        for engine in ready:
            engine.leaving = set()
        self._unload_unused(ready)
        self._states.settle_resident()
        able = [engine for engine in ready if engine.loading is None]
        if self._availability.state is not State.DRAINING or self._registry.queued:
            for id in self._states.wanted_models():
                if not able:
                    break
                if error := self._place(id, able, all_able=len(able) == len(ready)):
                    planned.unusable[id] = error
        planned.freed = any(old - engine.leaving for old, engine in zip(before, ready, strict=True))
        self._pool.models_wanted = bool(self._states.wanted or self._states.to_unload)
        return planned

    def _place(self, id: str, able: list[EngineHandle], *, all_able: bool) -> DarkroomError | None:
        """Load a model into one of the engines that are ``able``, or make room for it.

        That engine is able no more. Returns why the model fits none.
        """
        entry = self._states.entries[id]
        kept = self._more_urgent(id)
        found: list[tuple[EngineHandle, Room]] = []
        may_fit = not all_able
        for engine in able:
            residents = self.residents(engine)
            budget = engine.weight_budget(self._budget)
            room = make_room(entry.weight_bytes, budget, residents, kept)
            if room is not None:
                found.append((engine, room))
            elif kept and make_room(entry.weight_bytes, budget, residents) is not None:
                may_fit = True
        if not found:
            if may_fit:
                return None
            error = ModelMemory(id, self._why_no_room(entry))
            self._states.settle(entry, error)
            return error
        engine, room = min(
            found, key=lambda each: (bool(each[1].drain), each[1].cost, each[0].samples)
        )
        able.remove(engine)
        if room.drain:
            engine.leaving |= set(room.drain)
            return None
        for evicted in room.evict:
            self._states.evict(engine, evicted)
        entry.fetched_bytes = entry.fetch_bytes = 0
        engine.loading = ModelLoading(id, time.monotonic())
        engine.engine.load_model(id)
        self._states.report(id)
        return None

    def residents(self, engine: EngineHandle) -> list[Resident]:
        """The models in an engine's memory."""
        now = time.monotonic()
        jobs = Counter(active.job.model for active in engine.jobs.values())
        return [
            Resident(
                id=id,
                bytes=size,
                pinned=self._states.entries[id].pinned,
                busy=jobs[id] > 0,
                load_seconds=self._states.pace.expected(self._states.entries[id]),
                demand=self._registry.demand[id].now(now),
            )
            for id, size in engine.weights.items()
        ]

    def _more_urgent(self, id: str) -> set[str]:
        """The models of jobs that wait before the first one of ``id``."""
        if id in self._states.wanted:
            return set()
        before: set[str] = set()
        for active in self._registry.queue():
            if active.job.model == id:
                break
            before.add(active.job.model)
        return before

    def _unload_unused(self, ready: Iterable[EngineHandle]) -> None:
        loading = {each.loading.model for each in self._pool.engines if each.loading is not None}
        for id in self._states.to_unload - loading:
            if any(self._registry.counts(id)):
                continue
            self._states.to_unload.discard(id)
            for engine in ready:
                if id in engine.models:
                    engine.remove_model(id)
            self._states.report(id)

    def _why_no_room(self, entry: CatalogEntry) -> str:
        budget = max(engine.weight_budget(self._budget) for engine in self._pool.engines)
        pinned = [id for id, each in self._states.entries.items() if each.pinned]
        stay = f", of which {', '.join(pinned)} must stay" if pinned else ""
        return (
            f"its weights need {entry.weight_bytes} bytes, and models may have {budget:.0f}{stay}; "
            "unpin one, or raise --device-memory-budget"
        )
