"""The weights that an engine holds: of models on the device, and of others in the host's memory.

Parts of several models whose files are equal are held once.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import structlog
import torch

from darkroom_server.core.file_stamps import stamp_of
from darkroom_server.engine.loading.defaults import Defaults
from darkroom_server.engine.loading.pipeline import ModelFiles
from darkroom_server.engine.warmup.formats import MemoryFormat
from darkroom_server.engine.warmup.presets import Runtime
from darkroom_server.engine.weights.part_keys import part_keys
from darkroom_server.engine.weights.parts import Part

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldModel:
    """A model without its modules: what a load needs beside the weights of its ``parts``.

    ``pipeline`` has no components with weights. ``stamp`` is that of its files when they were read.
    """

    pipeline: Any
    parts: Mapping[str, Part]
    files: ModelFiles
    runtime: Runtime
    defaults: Defaults
    memory_format: MemoryFormat
    revision: str
    stamp: str

    @property
    def on_host(self) -> bool:
        """Whether the host's memory holds all its weights."""
        return all(part.reusable and part.host_weights is not None for part in self.parts.values())

    @property
    def host_bytes(self) -> int:
        """The bytes of its weights in the host's memory; 0 if it does not hold all."""
        return sum(part.bytes for part in self.parts.values()) if self.on_host else 0

    @property
    def shared(self) -> dict[str, int]:
        """The bytes of the parts that other models may hold too, by their keys."""
        parts = self.parts.values()
        return {part.key: part.bytes for part in parts if part.key and part.reusable}

    @property
    def current(self) -> bool:
        """Whether its files are those that were read."""
        try:
            return stamp_of(self.files.path) == self.stamp
        except OSError:
            return False

    def new_pipeline(self, device: torch.device) -> Any:
        """A pipeline with modules of the parts, on ``device``."""
        pipeline = copy.copy(self.pipeline)
        for name, part in self.parts.items():
            # Not by ``setattr``: it would register the component again.
            vars(pipeline)[name] = part.module(device)
        return pipeline


class WeightStore:
    """The weights of an engine's models.

    Called from the loop's thread, but for ``find`` and ``held``: what a reading thread finds stays
    until its model is added, or until ``end_read``.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._on_device: dict[str, HeldModel] = {}
        self._on_host: dict[str, HeldModel] = {}
        self._being_read: dict[str, tuple[Part, ...]] = {}

    def find(
        self, files: ModelFiles, runtime: Runtime, *, on_host: bool = False
    ) -> tuple[dict[str, str], dict[str, Part]]:
        """The keys of the parts of ``files``, and those parts that are on the device already.

        ``on_host``: or in the host's memory. The keys of parts that cannot be compared are missing.
        Raises ``OSError``.
        """
        keys = part_keys(files, runtime)
        places = (self._on_host, self._on_device) if on_host else (self._on_device,)
        known = {
            part.key: part
            for models in places
            for model in tuple(models.values())
            for part in model.parts.values()
            if part.key and part.reusable
        }
        found = {name: known[key] for name, key in keys.items() if key in known}
        self._being_read[files.source.id] = tuple(found.values())
        return keys, found

    def held(self, id: str) -> HeldModel | None:
        """What the host holds of a model that is not on the device; None if its files changed."""
        found = self._on_host.get(id)
        if found is None:
            return None
        if not found.current:
            log.info("files of a model have changed, they are read again", model=id)
            return None
        self._being_read[id] = tuple(found.parts.values())
        return found

    def add(self, id: str, model: HeldModel) -> None:
        """A model is on the device."""
        self._on_device[id] = model
        self._on_host.pop(id, None)
        self.end_read(id)

    def add_to_host(self, id: str, model: HeldModel) -> int:
        """A model was read into the host's memory; returns the bytes that it keeps of it."""
        if model.on_host:
            self._on_host[id] = model
        self._being_read.pop(id, None)
        self._free_unused(model)
        return model.host_bytes

    def end_read(self, id: str) -> None:
        """The thread that read the model has ended, whether or not it loaded it."""
        self._being_read.pop(id, None)
        self._free_unused()

    def remove(self, id: str, *, keep: bool) -> int:
        """A model is on the device no more; returns the bytes that the host keeps of it.

        ``keep``: the host keeps its weights, if it has them all. Without it, it drops them.
        """
        model = self._on_device.pop(id, None) or self._on_host.pop(id, None)
        if model is None:
            return 0
        kept = model.host_bytes if keep else 0
        if kept:
            self._on_host[id] = model
        self._free_unused(model)
        return kept

    def _free_unused(self, *removed: HeldModel) -> None:
        """Drop weights on the device and on the host that no model uses there."""
        models = (*self._on_device.values(), *self._on_host.values())
        being_read = {id(part) for parts in self._being_read.values() for part in parts}
        used = {id(part) for model in self._on_device.values() for part in model.parts.values()}
        used |= being_read
        kept = {id(part) for model in models for part in model.parts.values()} | being_read
        for model in (*models, *removed):
            for part in model.parts.values():
                if id(part) not in used:
                    part.device_weights = None
                if id(part) not in kept:
                    part.host_weights = None


def without_modules(pipeline: Any) -> Any:
    """A copy of ``pipeline`` without the components that have weights."""
    bare = copy.copy(pipeline)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            # Not by ``setattr``: it would register the component as one that is not there.
            vars(bare)[name] = None
    vars(bare)["scheduler"] = copy.deepcopy(pipeline.scheduler)
    return bare
