"""Where each model of the catalogue is, and what is wanted next."""

import time
from collections.abc import Collection

import structlog

from darkroom_server.core.catalog import ModelState
from darkroom_server.core.errors import DarkroomError
from darkroom_server.dispatch.admission.availability import Availability
from darkroom_server.dispatch.engines.handle import EngineHandle, ModelLoading
from darkroom_server.dispatch.engines.pool import EnginePool
from darkroom_server.dispatch.jobs.registry import JobRegistry
from darkroom_server.dispatch.models.entry import CatalogEntry, LoadPace
from darkroom_server.dispatch.models.host_tier import HostTier
from darkroom_server.dispatch.observer import ModelEvicted, ModelStateChanged, Observer, TierBytes

log = structlog.get_logger(__name__)


class _Entries(dict[str, CatalogEntry]):
    """By the model's id; of any id, because an engine says which models it holds."""

    def __missing__(self, id: str) -> CatalogEntry:
        entry = self[id] = CatalogEntry(id)
        return entry


class ModelStates:
    """The entries of the catalogue by id.

    ``wanted``: models that an admin wants loaded, in their order. ``to_unload``: those to unload
    once no job uses them. ``to_reload``: those whose files changed, and that are read again once
    the jobs in the engines have ended. ``pace``: how long loads take. ``pinned`` are the models of
    the start. ``host``: what the host's memory keeps, within ``host_budget`` bytes.
    """

    def __init__(
        self,
        availability: Availability,
        pool: EnginePool,
        registry: JobRegistry,
        observer: Observer,
        pinned: Collection[str],
        host_budget: int | None,
    ) -> None:
        self.entries: dict[str, CatalogEntry] = _Entries()
        self.wanted: dict[str, None] = {}
        self.to_unload: set[str] = set()
        self.to_reload: set[str] = set()
        self.pace = LoadPace()
        self.host = HostTier(self.entries, self.pace, registry, host_budget)
        self._availability = availability
        self._pool = pool
        self._registry = registry
        self._observer = observer
        for id in availability.models:
            self.entries[id] = CatalogEntry(id, pinned=id in pinned)

    def remove(self, id: str) -> None:
        """A model is in the catalogue no more."""
        self.entries.pop(id, None)
        self.wanted.pop(id, None)
        self.to_unload.discard(id)
        self.to_reload.discard(id)

    def state(self, id: str) -> ModelState:
        """Where a model is."""
        engines = self._pool.engines
        if any(engine.ready and id in engine.models for engine in engines):
            return ModelState.RESIDENT
        if any(each.model == id for engine in engines for each in engine.in_progress):
            return ModelState.LOADING
        if id in self._availability.failures:
            return ModelState.FAILED
        if self.in_host(id):
            return ModelState.HOST
        starting = not self._pool.ready and self.entries[id].pinned
        return ModelState.LOADING if starting else ModelState.AVAILABLE

    def in_memory(self, id: str) -> bool:
        """Whether a device or the host's memory holds the model."""
        return self.state(id) in (ModelState.RESIDENT, ModelState.HOST)

    def in_host(self, id: str) -> bool:
        """Whether the host's memory keeps a model for an engine."""
        return any(engine.ready and engine.has_in_host(id) for engine in self._pool.engines)

    def load_seconds(self, id: str) -> float:
        """What a load of the model probably takes, from where it is."""
        return self.pace.expected(self.entries[id], in_host=self.in_host(id))

    def want(self, id: str) -> None:
        """Load a model as soon as it fits."""
        self.wanted[id] = None
        self._pool.models_wanted = True

    def settle(self, entry: CatalogEntry, error: DarkroomError | None) -> None:
        """A load has ended: answer the calls that wait for it."""
        self.wanted.pop(entry.id, None)
        waiters, entry.waiters = entry.waiters, []
        for waiter in waiters:
            if waiter.done():
                continue  # Its call has ended.
            if error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(error)
        self.report(entry.id)

    def settle_resident(self) -> None:
        """Want no model that an engine has by now."""
        for id in [id for id in self.wanted if self.state(id) is ModelState.RESIDENT]:
            self.settle(self.entries[id], None)

    def begin_load(self, engine: EngineHandle, id: str) -> None:
        """Load a model into an engine that has room for it."""
        entry = self.entries[id]
        entry.fetched_bytes = entry.fetch_bytes = 0
        from_files = not engine.has_in_host(id)
        engine.loading = ModelLoading(id, time.monotonic(), from_files=from_files)
        engine.engine.load_model(id, keep=self.host.keep_from_load(engine, id))
        self.report_all()

    def begin_read(self, engine: EngineHandle, id: str) -> None:
        """Read a model into the host's memory, which has room for it."""
        engine.reading = ModelLoading(id, time.monotonic())
        engine.engine.load_model(id, keep=True, host_only=True)
        self.report_all()

    def evict(self, engine: EngineHandle, id: str, coming: str) -> None:
        """Unload a model that no job uses, to make room for ``coming``; the host may keep it."""
        keep = self.host.keep(engine, id, coming)
        log.info("model makes room", model=id, engine=engine.index, host_keeps=keep)
        engine.remove_model(id, keep=keep)
        self._observer.on_event(ModelEvicted(id))
        self.report_all()

    def report_tiers(self, engine: EngineHandle) -> None:
        """Report what an engine holds to the observer."""
        self._observer.on_event(TierBytes(engine.index, engine.bytes_by_tier))

    def report(self, id: str) -> None:
        """Report the state of a model to the observer if it has changed."""
        entry, state = self.entries[id], self.state(id)
        if state is not entry.reported:
            entry.reported = state
            self._observer.on_event(ModelStateChanged(id, state))

    def report_all(self) -> None:
        """Report every state that has changed."""
        for id in self.entries:
            self.report(id)
