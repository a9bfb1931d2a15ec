"""Looks at the files of models: which are new, have changed, or are gone."""

import asyncio
import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import structlog

from darkroom_server.core.catalog import ModelState
from darkroom_server.core.engine_config import ModelSource
from darkroom_server.core.file_stamps import stamp_or_none
from darkroom_server.core.model_places import ModelsFolder
from darkroom_server.dispatch.admission.availability import Availability
from darkroom_server.dispatch.engines.pool import EnginePool
from darkroom_server.dispatch.jobs.registry import JobRegistry
from darkroom_server.dispatch.models.entry import CatalogEntry
from darkroom_server.dispatch.models.states import ModelStates
from darkroom_server.dispatch.observer import ModelAdded, ModelRemoved, Observer

log = structlog.get_logger(__name__)

DESCRIBE_SECONDS = 5.0
"""How long a look waits for the descriptions of new models; an engine may load another one."""

FIND_SECONDS = 1.0
"""After a name was looked for in vain, none is for so long: callers must not keep the disk busy."""


class FileWatch:
    """Compares the files of models with those that were read; nothing runs between two looks.

    A model in memory whose files were written since is marked. One below ``folder`` enters the
    catalogue when it appears, is described again when its files change, and leaves when it is gone
    and nothing uses it: neither memory nor a job nor a call.
    """

    def __init__(
        self,
        states: ModelStates,
        availability: Availability,
        pool: EnginePool,
        registry: JobRegistry,
        observer: Observer,
        folder: ModelsFolder | None,
    ) -> None:
        self._states = states
        self._availability = availability
        self._pool = pool
        self._registry = registry
        self._observer = observer
        self._folder = folder
        self._in_folder = set(folder.at_start) if folder is not None else set()
        self._looking = asyncio.Lock()
        self._next: asyncio.Task[list[str]] | None = None
        self._last: asyncio.Task[list[str]] | None = None
        self._find_from = -math.inf
        self._undescribed: dict[str, asyncio.Event] = {}

    async def look(self) -> None:
        """Look once; new models are described if an engine can do that soon.

        Calls that come while one looks share the next look.
        """
        if self._folder is None and not self._locations():
            return
        await self._described(await asyncio.shield(self._begin()))

    async def find(self, id: str) -> None:
        """Look for a model that is not in the catalogue, and wait until an engine has described it.

        Nothing is looked for in ``FIND_SECONDS`` after a name was not found.
        """
        if self._folder is None:
            return
        known, looking = self._availability.models, self._last
        if id not in known and looking is not None and not looking.done():
            await asyncio.shield(looking)
        if id not in known and (now := time.monotonic()) >= self._find_from:
            self._find_from = now + FIND_SECONDS
            await asyncio.shield(self._begin())
            if id in known:
                self._find_from = -math.inf
        await self._described([id])

    def _begin(self) -> "asyncio.Task[list[str]]":
        """The next look, which returns the models that engines were asked to describe."""
        if self._next is None:
            self._next = self._last = asyncio.create_task(self._look())
        return self._next

    async def _look(self) -> list[str]:
        async with self._looking:
            self._next = None
            locations = self._locations()
            stamps, sources = await asyncio.to_thread(self._read, locations)
            for id in locations:
                if self._states.in_memory(id):
                    self._mark(self._states.entries[id], stamps[id])
            if sources is None:
                return []
            found = {source.id: source for source in sources}
            self._remove(self._in_folder - found.keys())
            new = [source for source in sources if source.id not in self._availability.models]
            for source in new:
                self._add(source)
            stale = [found[id] for id in found if self._is_stale(id, stamps.get(id, ""))]
            for source in stale:
                log.info("files of a model have changed", model=source.id)
                self._states.entries[source.id].described = stamps[source.id]
            self._describe(asked := [*new, *stale])
            return [source.id for source in asked]

    def _locations(self) -> dict[str, Path]:
        """Where the files are that matter: without a folder, those of models in memory."""
        return {
            entry.id: entry.location
            for entry in self._states.entries.values()
            if entry.location is not None
            and (self._folder is not None or (entry.stamp and self._states.in_memory(entry.id)))
        }

    def record_described(self, ids: Iterable[str]) -> None:
        """An engine has described these models."""
        for id in ids:
            if (described := self._undescribed.pop(id, None)) is not None:
                described.set()

    def _read(
        self, locations: Mapping[str, Path]
    ) -> tuple[dict[str, str], Sequence[ModelSource] | None]:
        stamps = {id: stamp_or_none(location) for id, location in locations.items()}
        return stamps, None if self._folder is None else self._folder.find()

    def _mark(self, entry: CatalogEntry, stamp: str) -> None:
        if entry.stamp and stamp != entry.stamp and not entry.changed:
            log.info("files of a model have changed", model=entry.id)
            entry.changed = True

    def _is_stale(self, id: str, stamp: str) -> bool:
        """Whether a model that is nowhere in memory was described from other files."""
        entry = self._states.entries.get(id)
        if entry is None or id not in self._in_folder or not (stamp and entry.described):
            return False
        return stamp != entry.described and not self._is_held(id)

    def _add(self, source: ModelSource) -> None:
        id = source.id
        self._in_folder.add(id)
        self._availability.add_model(id)
        location = Path(source.location).expanduser()
        self._states.entries[id] = CatalogEntry(id, location=location)
        self._observer.on_event(ModelAdded(id))
        self._states.report(id)
        log.info("model found", model=id, path=source.location)

    def _remove(self, gone: Collection[str]) -> None:
        """Remove models whose files are gone, unless something uses them."""
        unused = [id for id in gone if not self._is_used(id)]
        if not unused:
            return
        for id in unused:
            self._in_folder.discard(id)
            self._availability.remove_model(id)
            self._states.remove(id)
            for engine in self._pool.engines:
                engine.known.pop(id, None)
            self._observer.on_event(ModelRemoved(id))
            log.info("model is gone", model=id)
        for engine in self._pool.engines:
            engine.engine.forget_models(unused)

    def _is_held(self, id: str) -> bool:
        """Whether a device or the host's memory has the model, or gets it."""
        engines = self._pool.engines
        held = any(id in engine.models or id in engine.host for engine in engines)
        return held or self._states.state(id) is ModelState.LOADING

    def _is_used(self, id: str) -> bool:
        entry = self._states.entries[id]
        jobs = sum(self._registry.counts(id))
        return bool(jobs or entry.pinned or entry.waiters) or self._is_held(id)

    def _describe(self, sources: Sequence[ModelSource]) -> None:
        if not sources:
            return
        for source in sources:
            self._undescribed.setdefault(source.id, asyncio.Event())
        for engine in self._pool.engines:
            engine.engine.describe_models(sources)

    async def _described(self, ids: Iterable[str]) -> None:
        """Wait until an engine has described models that are new, if one can do that soon."""
        if not self._pool.ready:
            return  # It describes them when it starts.
        waited = [self._undescribed[id] for id in ids if id in self._undescribed]
        with suppress(TimeoutError):
            async with asyncio.timeout(DESCRIBE_SECONDS):
                for each in waited:
                    await each.wait()
