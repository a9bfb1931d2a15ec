"""Brings models into the engines' memory when they are asked for, and unloads others for them."""

import asyncio
import math
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType

import structlog

from darkroom_server.core.catalog import ModelDescription, ModelState, WeightOrigin
from darkroom_server.core.errors import (
    DarkroomError,
    ModelMemory,
    ModelUnusable,
    UnknownModel,
)
from darkroom_server.core.events import EngineReady
from darkroom_server.core.model import ModelInfo
from darkroom_server.core.model_events import (
    ModelFetching,
    ModelInHost,
    ModelLoad,
    ModelLoaded,
    ModelNotLoaded,
    ModelsDescribed,
    ModelUnloaded,
)
from darkroom_server.core.model_places import ModelsFolder
from darkroom_server.dispatch.admission.availability import Availability
from darkroom_server.dispatch.engines.handle import EngineHandle, ModelLoading
from darkroom_server.dispatch.engines.pool import EnginePool
from darkroom_server.dispatch.jobs.job import ActiveJob
from darkroom_server.dispatch.jobs.registry import JobRegistry
from darkroom_server.dispatch.models.entry import CatalogEntry, CatalogStatus, LoadProgress
from darkroom_server.dispatch.models.file_watch import FileWatch
from darkroom_server.dispatch.models.planner import LoadPlanner, Planned
from darkroom_server.dispatch.models.states import ModelStates
from darkroom_server.dispatch.observer import LoadOutcome, ModelLoadEnded, Observer

log = structlog.get_logger(__name__)

NO_LOCATIONS: Mapping[str, str] = MappingProxyType({})

MAX_DEATHS = 2
"""Engines that may die while they load a model, before it counts as unusable."""


class ModelCatalog:
    """Decides which models the engines hold.

    ``pinned`` are loaded at start. ``budget``: bytes for the weights of each engine's models, None
    for what its device leaves beside the largest batch. ``host_budget``: see ``HostTier``.
    ``locations``: paths and hub ids of the models. ``swap_wait``: the seconds after which the model
    of a waiting job should be loaded. An engine loads one model at a time, see ``LoadPlanner``.
    ``folder``: where models appear and vanish, see ``FileWatch``.
    """

    def __init__(
        self,
        availability: Availability,
        pool: EnginePool,
        registry: JobRegistry,
        observer: Observer,
        *,
        pinned: Collection[str],
        budget: int | None = None,
        host_budget: int | None = None,
        locations: Mapping[str, str] = NO_LOCATIONS,
        swap_wait: float = math.inf,
        folder: ModelsFolder | None = None,
    ) -> None:
        self._availability = availability
        self._pool = pool
        self._registry = registry
        self._observer = observer
        self._budget = budget
        self._states = ModelStates(availability, pool, registry, observer, pinned, host_budget)
        for id, location in locations.items():
            path = Path(location).expanduser()
            self._states.entries[id].location = path if path.exists() else None
        self._files = FileWatch(self._states, availability, pool, registry, observer, folder)
        self._planner = LoadPlanner(self._states, availability, pool, registry, budget, swap_wait)

    # What callers ask.

    def status(self, id: str) -> CatalogStatus:
        """Where the model is."""
        entry = self._states.entries[id]
        state = self._states.state(id)
        last = self._registry.last_used.get(id)
        return CatalogStatus(
            state=state,
            ready=any(id in engine.models for engine in self._pool.engines),
            reason=self._availability.failures.get(id, "") if state is ModelState.FAILED else "",
            weight_bytes=entry.weight_bytes,
            last_used=None if last is None else time.time() - (time.monotonic() - last),
            pinned=entry.pinned,
            load=self._progress(entry) if state is ModelState.LOADING else None,
            changed=entry.changed and state in (ModelState.RESIDENT, ModelState.HOST),
        )

    @property
    def in_memory(self) -> list[ModelInfo]:
        """The models that an engine has, in the order of the catalogue."""
        known = self._availability.models
        return [info for id, info in known.items() if info is not None and self.status(id).ready]

    def seconds_until_loaded(self, new: ActiveJob | None) -> dict[str, float]:
        """When each model is probably loaded that no engine holds and that jobs wait for.

        As if ``new`` waited too.
        """
        return self._planner.forecast(new)

    async def look_at_files(self) -> None:
        """Find out which models are new, are gone, or have files that were written since."""
        await self._files.look()

    async def find(self, id: str) -> None:
        """Find out whether a model that is not in the catalogue, or not described, is there by now.

        See ``FileWatch.find``.
        """
        await self._files.find(id)

    # What admins want. ``JobLifecycle.feed`` acts on it.

    def want(self, id: str) -> asyncio.Future[None]:
        """Have a model loaded; the result is set once it is, or gets the error.

        A model that failed is tried again. One whose files have changed is read again once the jobs
        in the engines have ended: those that wait use the new files. Raises ``UnknownModel`` or
        ``ModelMemory``.
        """
        entry = self._entry(id)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._states.state(id) is ModelState.RESIDENT:
            self._states.to_unload.discard(id)
            if not entry.changed:
                done.set_result(None)
                return done
            self._states.to_reload.add(id)
            self._pool.models_wanted = True
            entry.waiters.append(done)
            return done
        self._availability.failures.pop(id, None)
        entry.deaths = 0
        entry.waiters.append(done)
        self._states.to_unload.discard(id)
        self._states.want(id)
        self._states.report(id)
        return done

    def unload(self, id: str) -> int:
        """Unpin a model, and unload it once no job uses it; returns the number of those jobs.

        Raises ``UnknownModel``.
        """
        entry = self._entry(id)
        entry.pinned = False
        if self._states.state(id) is not ModelState.LOADING:
            self._states.settle(entry, ModelUnusable(id, "another call unloaded it meanwhile"))
        self._states.to_reload.discard(id)
        self._states.to_unload.add(id)
        self._pool.models_wanted = True
        return sum(self._registry.counts(id))

    def set_pinned(self, id: str, *, pinned: bool) -> None:
        """Let a model stay in memory, or no more. Raises ``UnknownModel``."""
        self._entry(id).pinned = pinned
        if pinned:
            self._states.to_unload.discard(id)
        log.info("model pinned" if pinned else "model unpinned", model=id)

    # What engines report.

    def record_ready(self, engine: EngineHandle, ready: EngineReady) -> None:
        """An engine has started, with the models that are loaded at the start."""
        for description in ready.descriptions:
            self._record_description(description)
        self._files.record_described(each.id for each in ready.descriptions)
        for load in ready.loads:
            self._record_read(load).copies_fail = False
            self._record_pace(load)
            self._count(load.model, load.origin, LoadOutcome.LOADED)
        self._states.host.start(engine, len(self._pool.engines))
        held = engine.bytes_by_tier["device"]
        if (budget := engine.weight_budget(self._budget)) < held:
            log.warning(
                "the models that are loaded at start exceed the memory budget",
                budget=budget,
                bytes=held,
            )
        for id, entry in self._states.entries.items():
            if entry.pinned and id not in engine.models and id not in self._availability.failures:
                self._states.want(id)
        self._states.report_all()
        self._states.report_tiers(engine)

    def record_described(self, engine: EngineHandle, event: ModelsDescribed) -> None:
        """An engine has described models that are new, or whose files have changed."""
        for each in event.descriptions:
            if each.id not in self._availability.models:
                continue  # It was removed meanwhile.
            if each.info is not None and each.id not in engine.models:
                engine.describe(each.info)
            if not any(each.id in other.models for other in self._pool.engines):
                self._record_description(each)
                if each.id in self._availability.failures:
                    self._states.entries[each.id].deaths = 0  # It has other files than failed.
                self._availability.describe_again(each)
                self._states.report(each.id)
        self._files.record_described(each.id for each in event.descriptions)

    def _record_description(self, description: ModelDescription) -> None:
        entry = self._states.entries[description.id]
        if description.stamp != entry.stamp:
            entry.shared = {}  # They were of other files.
        if description.stamp != entry.described:
            entry.copies_fail = False  # They were copies of other files.
        entry.described = description.stamp
        if description.weight_bytes:
            entry.weight_bytes = description.weight_bytes

    def _record_read(self, load: ModelLoad) -> CatalogEntry:
        """The files of a model were read; returns what is known of it now."""
        entry = self._states.entries[load.model]
        entry.weight_bytes, entry.shared = load.weight_bytes, load.shared
        entry.stamp, entry.described, entry.changed = load.stamp, load.stamp, False
        return entry

    def record_loaded(self, engine: EngineHandle, loaded: ModelLoaded) -> None:
        """An engine has loaded a model."""
        id, load = loaded.info.id, loaded.load
        entry = self._record_read(load)
        entry.deaths, entry.copies_fail = 0, False
        self._count(id, load.origin, LoadOutcome.LOADED, engine.loading)
        engine.add_model(loaded.info, load, loaded.free_bytes)
        self._availability.set_model(loaded.info)
        self._record_pace(load)
        self._states.settle(entry, None)
        self._states.report_tiers(engine)

    def record_in_host(self, engine: EngineHandle, event: ModelInHost) -> None:
        """An engine has read a model into the host's memory, or the model cannot be kept there."""
        load = event.load
        if load.host_bytes:
            entry = self._record_read(load)
            self._states.pace.record_read(entry, load.load_seconds)
            self._count(load.model, load.origin, LoadOutcome.LOADED, engine.reading)
        engine.add_to_host(load)
        self._states.report_all()
        self._states.report_tiers(engine)

    def record_not_loaded(
        self, engine: EngineHandle, event: ModelNotLoaded
    ) -> DarkroomError | None:
        """An engine could not load a model; returns why its jobs cannot run, None if they may.

        Without memory, a model that no job uses is unloaded, one in the host's memory first if that
        is the device's, and the load is tried again. A model that does not fit the host's memory
        is loaded without it.
        """
        entry = self._states.entries[event.model]
        reading = engine.reading
        if reading is not None and reading.model == event.model:
            return self._record_not_read(engine, reading, event)
        origin = _origin_of_files(entry)
        if event.model in engine.host and not engine.has_host_memory:
            origin = WeightOrigin.HOST
        self._count(event.model, origin, LoadOutcome.FAILED, engine.loading)
        engine.loading = None
        if event.out_of_memory:
            if not engine.has_host_memory and self._states.host.drop_one(engine, event.model):
                self._states.report_all()
                return None
            idle = [r for r in self._planner.residents(engine) if not (r.pinned or r.busy)]
            if idle:
                cheapest = min(idle, key=lambda each: each.cost)
                self._states.evict(engine, cheapest.id, event.model)
                self._states.report(event.model)
                return None
        error = self._fail(entry, event.reason, no_memory=event.out_of_memory)
        if event.model in engine.host:
            engine.drop_from_host(event.model)
        self._states.settle(entry, error)
        return error

    def _record_not_read(
        self, engine: EngineHandle, reading: ModelLoading, event: ModelNotLoaded
    ) -> DarkroomError | None:
        entry = self._states.entries[event.model]
        self._count(event.model, _origin_of_files(entry), LoadOutcome.FAILED, reading)
        engine.reading = None
        engine.drop_from_host(event.model)
        if event.out_of_memory:
            if not self._states.host.drop_one(engine, event.model):
                engine.files_only.add(event.model)
            self._states.report_all()
            return None
        error = self._fail(entry, event.reason)
        self._states.settle(entry, error)
        return error

    def _fail(
        self, entry: CatalogEntry, reason: str, *, no_memory: bool = False
    ) -> DarkroomError | None:
        """A load has failed; returns why, None if another engine has the model and serves on."""
        if self._states.state(entry.id) is ModelState.RESIDENT:
            log.warning("no further engine loads the model", model=entry.id, why=reason)
            entry.copies_fail = True
            return None
        if no_memory:
            return ModelMemory(entry.id, reason)
        self._availability.failures[entry.id] = reason
        return ModelUnusable(entry.id, reason)

    def record_unloaded(self, engine: EngineHandle, event: ModelUnloaded) -> None:
        """An engine has freed the memory of a model."""
        engine.record_unloaded(event)
        self._states.report(event.model)
        self._states.report_tiers(engine)

    def record_fetching(self, event: ModelFetching) -> None:
        """An engine fetches a model from the hub."""
        entry = self._states.entries[event.model]
        entry.fetched_bytes, entry.fetch_bytes = event.fetched_bytes, event.fetch_bytes

    def record_death(self, engine: EngineHandle) -> dict[str, DarkroomError | None]:
        """An engine died: while it loaded models, one of them is the cause.

        Returns these models, and why their jobs cannot run, None if the load is tried again: alone
        if there were two, so that a second death is that of one model. Empty if the engine loaded
        nothing.
        """
        found: dict[str, DarkroomError | None] = {}
        for loading in engine.in_progress:
            entry = self._states.entries[loading.model]
            entry.deaths += 1
            self._count(loading.model, WeightOrigin.DISK, LoadOutcome.FAILED, loading)
            log.warning("engine died during a load", model=loading.model, deaths=entry.deaths)
            error = None
            if entry.deaths >= MAX_DEATHS:
                why = f"{entry.deaths} engines died while they loaded it; its files may be damaged"
                error = self._fail(entry, why)
                self._states.settle(entry, error)
            elif entry.waiters:
                self._states.want(loading.model)
            found[loading.model] = error
        engine.loading = engine.reading = None
        return found

    def plan(self) -> Planned:
        """Unload what is wanted no more, and begin the loads that are due or pay."""
        return self._planner.plan()

    def report(self) -> None:
        """Report every state that has changed to the observer."""
        self._states.report_all()

    def _entry(self, id: str) -> CatalogEntry:
        if id not in self._availability.models:
            raise UnknownModel(id[:256], list(self._availability.models))
        return self._states.entries[id]

    def _progress(self, entry: CatalogEntry) -> LoadProgress:
        remaining = None
        for loading in (each for engine in self._pool.engines for each in engine.in_progress):
            if loading.model == entry.id:
                elapsed = time.monotonic() - loading.began
                remaining = self._states.load_seconds(entry.id) - elapsed
        return LoadProgress(
            fetched_bytes=entry.fetched_bytes,
            fetch_bytes=entry.fetch_bytes,
            remaining_seconds=None if remaining is None or remaining <= 0 else remaining,
        )

    def _record_pace(self, load: ModelLoad) -> None:
        seconds = load.load_seconds + load.warm_up_seconds
        self._states.pace.record(self._states.entries[load.model], seconds, load.origin)

    def _count(
        self,
        id: str,
        origin: WeightOrigin,
        outcome: LoadOutcome,
        loading: ModelLoading | None = None,
    ) -> None:
        """Count the end of ``loading``, None for a load of the start."""
        seconds = time.monotonic() - loading.began if loading is not None else 0.0
        self._observer.on_event(ModelLoadEnded(id, origin, outcome, seconds))


def _origin_of_files(entry: CatalogEntry) -> WeightOrigin:
    return WeightOrigin.HUB if entry.fetched_bytes else WeightOrigin.DISK
