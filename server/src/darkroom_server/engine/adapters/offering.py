"""Which of the server's adapters fit a model, found from the headers of their files."""

import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import nn

from darkroom_server.core.adapters import AdapterOffer
from darkroom_server.core.engine_config import AdapterSource, EngineConfig
from darkroom_server.core.errors import StartupError
from darkroom_server.core.events import AdapterChecked
from darkroom_server.engine.adapters.model_adapters import ModelAdapters
from darkroom_server.engine.adapters.module import AdaptedModule, row_layers_of
from darkroom_server.engine.adapters.reading import AdapterMismatch, read_headers
from darkroom_server.engine.adapters.sources import AdapterFound, adapter_file
from darkroom_server.engine.adapters.store import AdapterSetup, Key
from darkroom_server.engine.families.base import Family, Precision
from darkroom_server.engine.warmup.formats import MemoryFormat
from darkroom_server.engine.warmup.measurement import configuration

TAKES_NONE = "this kind of model takes no adapters"

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
        """Those that ``config`` names.

        Raises ``StartupError`` if one that must be there cannot be found.
        """
        files = {}
        for source in config.adapters:
            try:
                files[source.id] = adapter_file(source)
            except StartupError as error:
                if not config.adapter_may_fail(source):
                    raise
                log.warning("adapter is not offered", adapter=source.id, why=str(error))
        return cls(config, files)

    def may_fit(self, family: Family) -> bool:
        """Whether there may be adapters, and the model of ``family`` takes some."""
        takes = family.takes_loras and hasattr(family.pipeline, "lora_state_dict")
        return (bool(self.files) or self.config.adapters_may_come) and takes

    def offer(self, model_id: str, family: Family, dtype: torch.dtype) -> tuple[AdapterOffer, ...]:
        """The adapters that fit the model of ``family``, whose weights are of ``dtype``."""
        ids = [each.id for each in self._offered()]
        if not self.may_fit(family):
            self.mismatches |= {(model_id, id): TAKES_NONE for id in ids}
            return ()
        return tuple(
            offer for id in ids if (offer := self._offer(model_id, id, family, dtype)) is not None
        )

    def setup(self) -> AdapterSetup:
        """What the loop needs.

        Raises ``StartupError`` for an adapter that must fit a model, and fits none.
        """
        for source in self._offered():
            if not any(id == source.id for _, id in self.fitting):
                self._fits_none(source)
        return AdapterSetup(
            files=self.files,
            withdrawn=frozenset(each.id for each in self.config.adapters if each.withdrawn),
            max_in_batch=self.config.max_loras,
            max_rank=self.config.max_lora_rank,
            cache_bytes=self.config.lora_cache_bytes,
        )

    def _offered(self) -> list[AdapterSource]:
        """The adapters that requests may name, if they fit."""
        return [
            each for each in self.config.adapters if each.id in self.files and not each.withdrawn
        ]

    def _offer(
        self, model_id: str, id: str, family: Family, dtype: torch.dtype
    ) -> AdapterOffer | None:
        try:
            offer = offer_of(self.files[id], id, family.pipeline, dtype, self.config.max_lora_rank)
        except (AdapterMismatch, OSError) as error:
            self.mismatches[model_id, id] = str(error)
            return None
        if offer.rejection:
            log.warning("adapter is rejected", adapter=id, model=model_id, why=offer.rejection)
        self.fitting[model_id, id] = offer
        return offer

    def _fits_none(self, source: AdapterSource) -> None:
        reasons = "; ".join(
            f"{model}: {why}" for (model, id), why in self.mismatches.items() if id == source.id
        )
        if not self.config.adapter_may_fail(source):
            raise StartupError(f"LoRA {source.location!r} fits no model ({reasons})")
        log.warning("adapter fits no model", adapter=source.id, why=reasons)


def offer_of(file: Path, id: str, pipeline: Any, dtype: torch.dtype, max_rank: int) -> AdapterOffer:
    """The offer of the adapter in ``file`` to a model, whose weights are of ``dtype``.

    Raises ``AdapterMismatch`` if it does not fit, and ``OSError`` if the file cannot be read.
    """
    found = read_headers(file, id, pipeline)
    rejected = found.rank > max_rank
    return AdapterOffer(
        id=id,
        rank=found.rank,
        bytes=found.bytes_as(dtype),
        rejection=f"its rank is {found.rank}, the server takes {max_rank}" if rejected else "",
    )


def check_adapter(
    found: AdapterFound, models: Mapping[str, ModelAdapters], max_rank: int
) -> AdapterChecked:
    """Which of ``models`` the adapter fits, while they serve jobs."""
    id, file = found.source.id, found.file
    if file is None:
        return AdapterChecked(adapter=id, file="", offers={}, reason=found.reason)
    offers, reasons = {}, []
    for model_id, model in models.items():
        try:
            offers[model_id] = offer_of(file, id, model.pipeline, model.dtype, max_rank)
        except (AdapterMismatch, OSError) as error:
            reasons.append(f"{model_id}: {error}")
    return AdapterChecked(
        adapter=id,
        file=str(file),
        offers=offers,
        reason="" if offers else "; ".join(reasons) or TAKES_NONE,
    )


def model_adapters(
    family: Family,
    memory_format: MemoryFormat,
    device: torch.device,
    precision: Precision,
    slots: int,
    row_layers: dict[Hashable, frozenset[str]],
) -> ModelAdapters:
    """The adapters of a model that is ready to be measured, none of them in memory.

    ``row_layers`` are those of the denoisers so far, by architecture; this one's are added.
    """
    denoiser = family.denoiser
    candidates = {
        name for name, part in denoiser.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)
    }

    def call(rows: int) -> None:
        inputs = family.denoiser_inputs(rows, memory_format.dtype, device, memory_format.layout)
        with precision():
            denoiser(**inputs)

    config = json.dumps(configuration(denoiser), sort_keys=True, default=str)
    architecture = type(denoiser), config, frozenset(candidates)
    if architecture not in row_layers:
        row_layers[architecture] = row_layers_of(denoiser, call, candidates)
    modules: Mapping[str, AdaptedModule] = {
        name: AdaptedModule(
            getattr(family.pipeline, name),
            slots=slots,
            dtype=memory_format.dtype,
            row_layers=row_layers[architecture] if name == family.denoiser_name else None,
        )
        for name in type(family.pipeline)._lora_loadable_modules
        if getattr(family.pipeline, name, None) is not None
    }
    return ModelAdapters(family.pipeline, family.denoiser_name, modules, memory_format.dtype)
