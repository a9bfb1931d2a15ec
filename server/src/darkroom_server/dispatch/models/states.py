"""Where each model of the catalogue is, and what is wanted next."""

from collections.abc import Collection

import structlog

from darkroom_server.core.catalog import ModelState
from darkroom_server.core.errors import DarkroomError
from darkroom_server.dispatch.admission.availability import Availability
from darkroom_server.dispatch.engines.handle import EngineHandle
from darkroom_server.dispatch.engines.pool import EnginePool
from darkroom_server.dispatch.jobs.registry import JobRegistry
from darkroom_server.dispatch.models.entry import CatalogEntry, LoadPace
from darkroom_server.dispatch.observer import ModelEvicted, ModelStateChanged, Observer

log = structlog.get_logger(__name__)


class _Entries(dict[str, CatalogEntry]):
    """By the model's id; of any id, because an engine says which models it holds."""

    def __missing__(self, id: str) -> CatalogEntry:
        entry = self[id] = CatalogEntry(id)
        return entry


class ModelStates:
    """The entries of the catalogue by id.

    ``wanted``: models that an admin wants loaded, in their order. ``to_unload``: those to unload
    once no job uses them. ``pace``: how long loads take. ``pinned`` are the models of the start.
    """

    def __init__(
        self,
        availability: Availability,
        pool: EnginePool,
        registry: JobRegistry,
        observer: Observer,
        pinned: Collection[str],
    ) -> None:
        self.entries: dict[str, CatalogEntry] = _Entries()
        self.wanted: dict[str, None] = {}
        self.to_unload: set[str] = set()
        self.pace = LoadPace()
        self._availability = availability
        self._pool = pool
        self._registry = registry
        self._observer = observer
        for id in availability.models:
            self.entries[id] = CatalogEntry(id, pinned=id in pinned)

    def state(self, id: str) -> ModelState:
        """Where a model is."""
        engines = self._pool.engines
        if any(engine.ready and id in engine.models for engine in engines):
            return ModelState.RESIDENT
        if any(engine.loading is not None and engine.loading.model == id for engine in engines):
            return ModelState.LOADING
        if id in self._availability.failures:
            return ModelState.FAILED
        starting = not self._pool.ready and self.entries[id].pinned
        return ModelState.LOADING if starting else ModelState.AVAILABLE

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

    def evict(self, engine: EngineHandle, id: str) -> None:
        """Unload a model that no job uses, to make room for another."""
        log.info("model makes room", model=id, engine=engine.index)
        engine.remove_model(id)
        self._observer.on_event(ModelEvicted(id))
        self.report(id)

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
