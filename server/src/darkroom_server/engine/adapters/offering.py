"""Which of the server's adapters fit a model, found from the headers of their files."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog
import torch
from torch import nn

from darkroom_server.core.adapters import AdapterOffer
from darkroom_server.core.engine_config import AdapterSource, EngineConfig
from darkroom_server.core.errors import StartupError
from darkroom_server.engine.adapters.model_adapters import ModelAdapters
from darkroom_server.engine.adapters.module import AdaptedModule, row_layers_of
from darkroom_server.engine.adapters.reading import AdapterMismatch, read_headers
from darkroom_server.engine.adapters.sources import adapter_file
from darkroom_server.engine.adapters.store import AdapterSetup, Key
from darkroom_server.engine.families.base import Family, Precision
from darkroom_server.engine.warmup.formats import MemoryFormat

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Adapters:
    """The adapters of a server, while its models are loaded.

    ``files`` are theirs, by id. ``fitting`` are those that fit a model, ``mismatches`` say why one
    does not fit, by model and adapter.
    """

    config: EngineConfig
    files: dict[str, Path]
    fitting: dict[Key, AdapterOffer] = field(default_factory=dict)
    mismatches: dict[Key, str] = field(default_factory=dict)

    @classmethod
    def of(cls, config: EngineConfig) -> "Adapters":
        """Those that ``config`` names. Raises ``StartupError`` if one cannot be found."""
        files = {}
        for source in config.adapters:
            try:
                files[source.id] = adapter_file(source)
            except StartupError as error:
                if not source.from_folder:
                    raise
                log.warning("adapter is not offered", adapter=source.id, why=str(error))
        return cls(config, files)

    def may_fit(self, family: Family) -> bool:
        """Whether the server has adapters, and the model of ``family`` takes some."""
        takes = family.takes_loras and hasattr(family.pipeline, "lora_state_dict")
        return bool(self.files) and takes

    def offer(self, model_id: str, family: Family, dtype: torch.dtype) -> tuple[AdapterOffer, ...]:
        """The adapters that fit the model of ``family``, whose weights are of ``dtype``."""
        if not self.may_fit(family):
            self.mismatches |= {
                (model_id, id): "this kind of model takes no adapters" for id in self.files
            }
            return ()
        offers = [offer for id in self.files if (offer := self._offer(model_id, id, family, dtype))]
        return tuple(offers)

    def setup(self) -> AdapterSetup:
        """What the loop needs. Raises ``StartupError`` for an adapter that fits no model."""
        for source in self.config.adapters:
            if source.id in self.files and not any(id == source.id for _, id in self.fitting):
                self._fits_none(source)
        files = {(model, id): self.files[id] for model, id in self.fitting}
        return AdapterSetup(files, self.config.max_loras, self.config.lora_cache_bytes)

    def _offer(
        self, model_id: str, id: str, family: Family, dtype: torch.dtype
    ) -> AdapterOffer | None:
        try:
            found = read_headers(self.files[id], id, family.pipeline)
        except (AdapterMismatch, OSError) as error:
            self.mismatches[model_id, id] = str(error)
            return None
        rejection = ""
        if found.rank > self.config.max_lora_rank:
            rejection = f"its rank is {found.rank}, the server takes {self.config.max_lora_rank}"
            log.warning("adapter is rejected", adapter=id, model=model_id, why=rejection)
        offer = AdapterOffer(
            id=id, rank=found.rank, bytes=found.bytes_as(dtype), rejection=rejection
        )
        self.fitting[model_id, id] = offer
        return offer

    def _fits_none(self, source: AdapterSource) -> None:
        reasons = "; ".join(
            f"{model}: {why}" for (model, id), why in self.mismatches.items() if id == source.id
        )
        if not source.from_folder:
            raise StartupError(f"LoRA {source.location!r} fits no model ({reasons})")
        log.warning("adapter fits no model", adapter=source.id, why=reasons)


def model_adapters(
    family: Family,
    memory_format: MemoryFormat,
    device: torch.device,
    precision: Precision,
    slots: int,
) -> ModelAdapters:
    """The adapters of a model that is ready to be measured, none of them in memory."""
    denoiser = family.denoiser
    candidates = {
        name for name, part in denoiser.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)
    }

    def call(rows: int) -> None:
        inputs = family.denoiser_inputs(rows, memory_format.dtype, device, memory_format.layout)
        with precision():
            denoiser(**inputs)

    modules: Mapping[str, AdaptedModule] = {
        name: AdaptedModule(
            getattr(family.pipeline, name),
            slots=slots,
            dtype=memory_format.dtype,
            row_layers=row_layers_of(denoiser, call, candidates)
            if name == family.denoiser_name
            else None,
        )
        for name in type(family.pipeline)._lora_loadable_modules
        if getattr(family.pipeline, name, None) is not None
    }
    return ModelAdapters(family.pipeline, family.denoiser_name, modules, memory_format.dtype)
