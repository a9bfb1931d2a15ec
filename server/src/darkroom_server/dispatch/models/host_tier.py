"""Which models the host's memory keeps, so that they come back to the device sooner."""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import structlog

from darkroom_server.core.residency import largest_batch_bytes
from darkroom_server.dispatch.engines.handle import EngineHandle
from darkroom_server.dispatch.jobs.registry import JobRegistry
from darkroom_server.dispatch.models.entry import CatalogEntry, LoadPace
from darkroom_server.dispatch.models.residency import Shared, held_bytes

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class HostModel:
    """A model in the host's memory: its bytes, and the seconds that it probably saves.

    ``shared``: the part of its bytes that other models may hold too.
    """

    bytes: int
    value: float
    shared: Shared = field(default_factory=dict)


STAGED_SHARE = 0.25
"""Of the host's memory: what reads may take from other models whatever those are worth."""


def models_to_drop(
    new: HostModel,
    held: Mapping[str, HostModel],
    budget: float,
    staying: Iterable[tuple[int, Shared]] = (),
) -> tuple[str, ...] | None:
    """Which of ``held`` make room for ``new`` within ``budget``; None if it is not worth it.

    ``staying``: the bytes of models that make no room, each with those that others may hold too.
    Those of the least value for their bytes go, and never more value than ``new`` has.
    """
    fixed = [(new.bytes, new.shared), *staying]
    kept = dict(held)

    def missing() -> float:
        return held_bytes((*fixed, *((each.bytes, each.shared) for each in kept.values()))) - budget

    chosen: list[str] = []
    for id in sorted(held, key=lambda id: (held[id].value / max(1, held[id].bytes), id)):
        if missing() <= 0:
            break
        chosen.append(id)
        del kept[id]
    if missing() > 0:
        return None
    # One that was chosen early may free nothing, if others that stay hold its parts.
    for id in reversed(chosen.copy()):
        kept[id] = held[id]
        if missing() <= 0:
            chosen.remove(id)
        else:
            del kept[id]
    lost = sum(held[id].value for id in chosen)
    return tuple(chosen) if lost <= new.value else None


class HostTier:
    """Keeps models of each engine in the host's memory, within ``budget`` bytes for each.

    ``budget`` None: what is free there when the engine has started, less what the largest batch
    needs, shared by the engines. On a CPU the host's memory is the device's, so None means none
    there.
    """

    def __init__(
        self,
        entries: Mapping[str, CatalogEntry],
        pace: LoadPace,
        registry: JobRegistry,
        budget: int | None,
    ) -> None:
        self._entries = entries
        self._pace = pace
        self._registry = registry
        self._budget = budget

    def start(self, engine: EngineHandle, engines: int) -> None:
        """One of ``engines`` has started, with nothing in the host's memory."""
        engine.host_budget = self._budget or 0
        if self._budget is None and engine.host_free_bytes is not None:
            known = (*engine.models.values(), *engine.known.values())
            needed = max(map(largest_batch_bytes, known), default=0)
            engine.host_budget = max(0, engine.host_free_bytes - needed) // engines

    def keep_from_load(self, engine: EngineHandle, id: str) -> bool:
        """Whether a model that is loaded now stays in the host's memory beside the device's.

        So no copy back is needed when it leaves the device.
        """
        return engine.has_host_memory and self._admit(engine, id, id)

    def stage(self, engine: EngineHandle, id: str) -> bool:
        """Make room for a model that is to be read into the host's memory; False if there is none.

        The models of the least value make room even if they are worth more than this one: else its
        load would keep others from being loaded for as long as a read takes.
        """
        size = self._entries[id].weight_bytes
        if not size or id in engine.files_only or id in engine.host:
            return False
        return self._admit(engine, id, id, any_value=size <= STAGED_SHARE * engine.host_budget)

    def keep(self, engine: EngineHandle, id: str, coming: str) -> bool:
        """Whether the host keeps a model that leaves the device to make room for ``coming``."""
        return id in engine.host or (not engine.has_host_memory and self._admit(engine, id, coming))

    def drop_one(self, engine: EngineHandle, but: str) -> bool:
        """Drop the model of the least value, ``but`` not this one; False if there is none."""
        held = self._droppable(engine)
        held.pop(but, None)
        if held:
            self._drop(engine, min(held, key=lambda id: (held[id].value, id)))
        return bool(held)

    def _admit(
        self, engine: EngineHandle, id: str, coming: str, *, any_value: bool = False
    ) -> bool:
        """Make room for a model on the host, if that is worth it, or for ``any_value``.

        Neither ``coming`` nor a model that jobs wait for makes room: it would be read again.
        """
        if id in engine.host:
            return True
        entry = self._entries[id]
        shared = engine.shared_of(id) if id in engine.weights else entry.shared
        new = self._model(id, entry.weight_bytes, shared)
        if any_value:
            new = replace(new, value=math.inf)
        held = {
            other: each
            for other, each in self._droppable(engine).items()
            if other != coming and not self._registry.counts(other)[0]
        }
        staying = [
            (size, engine.shared_of(other))
            for other, size in engine.host.items()
            # It is the device's once it is loaded, if that is the same memory.
            if other not in held and (engine.has_host_memory or other != coming)
        ]
        dropped = models_to_drop(new, held, engine.host_budget, staying)
        if dropped is None:
            return False
        for other in dropped:
            self._drop(engine, other)
        engine.host[id], engine.shared[id] = new.bytes, shared
        return True

    def _drop(self, engine: EngineHandle, id: str) -> None:
        log.info("model leaves the host's memory", model=id, engine=engine.index)
        engine.drop_from_host(id)

    def _droppable(self, engine: EngineHandle) -> dict[str, HostModel]:
        """What the host keeps of the engine, but what it uses now."""
        used = {*engine.models, *(each.model for each in engine.in_progress)}
        return {
            id: self._model(id, size, engine.shared_of(id))
            for id, size in engine.host.items()
            if id not in used
        }

    def _model(self, id: str, size: int, shared: Shared) -> HostModel:
        entry = self._entries[id]
        saved = self._pace.expected(entry) - self._pace.expected(entry, in_host=True)
        value = max(0.0, saved) * self._registry.demand[id].now(time.monotonic())
        return HostModel(size, value, shared)
