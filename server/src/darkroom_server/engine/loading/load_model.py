"""Loads one model in two parts: reads it onto its device, and measures it there.

The first part runs on any thread, the second on the one that runs batches.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import structlog
import torch

from darkroom_server.core.adapters import AdapterOffer
from darkroom_server.core.catalog import WeightOrigin
from darkroom_server.core.engine_config import EngineConfig, ModelSource
from darkroom_server.core.errors import StartupError
from darkroom_server.core.model import ModelInfo
from darkroom_server.core.model_events import ModelLoad
from darkroom_server.engine.adapters.offering import Adapters, model_adapters
from darkroom_server.engine.catalogue.fetching import cached_bytes
from darkroom_server.engine.catalogue.slices import pause
from darkroom_server.engine.components.attention import SlicedAttention
from darkroom_server.engine.components.decoder import Decoder
from darkroom_server.engine.components.safety_checker import SafetyChecker
from darkroom_server.engine.conditioning.ip_adapter import IpAdapter
from darkroom_server.engine.controls.offering import ControlNets
from darkroom_server.engine.failures import is_out_of_memory
from darkroom_server.engine.families.base import Family, Model
from darkroom_server.engine.families.registry import family_of
from darkroom_server.engine.forms.offering import denoiser_forms
from darkroom_server.engine.loading.defaults import Defaults, read_defaults
from darkroom_server.engine.loading.fit import check_weights_fit
from darkroom_server.engine.loading.model_info import model_info, set_size
from darkroom_server.engine.loading.pipeline import (
    ModelFiles,
    find_model,
    load_pipeline,
    weights_of,
)
from darkroom_server.engine.loading.revision import UNKNOWN, revision_of
from darkroom_server.engine.warmup.formats import MemoryFormat
from darkroom_server.engine.warmup.measurement import measure, slices_get_finer
from darkroom_server.engine.warmup.measurement_cache import MeasurementCache
from darkroom_server.engine.warmup.placement import own_weights, place, vae_is_upcast
from darkroom_server.engine.warmup.presets import Runtime, resolve

log = structlog.get_logger(__name__)


class NoMemory(StartupError):
    """The model does not fit what the device has left now."""


@dataclass(slots=True, kw_only=True)
class ReadModel:
    """A model whose weights are on its device, and that was not called yet.

    ``loras`` are the adapters that fit it. ``began`` and ``in_memory`` are monotonic seconds, the
    begin and the end of the read. ``needed`` bytes of ``available`` are those of its weights.
    """

    files: ModelFiles
    runtime: Runtime
    previous: ModelInfo | None
    family: Family
    defaults: Defaults
    safety: SafetyChecker | None
    memory_format: MemoryFormat
    loras: tuple[AdapterOffer, ...]
    takes_loras: bool
    revision: str
    origin: WeightOrigin
    needed: int
    available: int
    began: float
    in_memory: float

    def precision(self) -> AbstractContextManager[Any]:
        """The context in which a component is called."""
        return self.runtime.precision(self.memory_format.dtype)

    def vae_precision(self) -> AbstractContextManager[Any]:
        """The context in which the VAE is called."""
        return nullcontext() if vae_is_upcast(self.family.pipeline) else self.precision()


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that can be served, the cache of its measurements, and the modules with weights."""

    model: Model
    load: ModelLoad
    cache: MeasurementCache
    modules: tuple[torch.nn.Module, ...]


def load_model(
    source: ModelSource, config: EngineConfig, adapters: Adapters, controlnets: ControlNets
) -> LoadedModel:
    """The model of ``source``, on its device, warmed up and measured. Raises ``StartupError``.

    What an earlier engine of this server measured, or an earlier start, is not measured again.
    ``adapters`` and ``controlnets`` record which of them
    fit the model.
    """
    return finish_model(read_model(source, config, adapters), config, controlnets)


def files_of(
    source: ModelSource, config: EngineConfig, previous: ModelInfo | None
) -> tuple[ModelFiles, Runtime]:
    """The files of ``source``, and how the model will run. Raises ``StartupError``."""
    if previous is not None and previous.revision not in ("", UNKNOWN):
        # The same weights, even if the hub has newer ones now.
        source = replace(source, revision=previous.revision)
    files = find_model(source, safety_checker=config.safety_checker)
    half = files.family.half
    if files.ip_adapter is not None:
        # Sliced attention would replace the attention that reads the image.
        half = replace(half, slices_attention=False)
    return files, resolve(config, half)


def read_model(source: ModelSource, config: EngineConfig, adapters: Adapters) -> ReadModel:
    """The model of ``source``, its weights on its device.

    ``adapters`` record which of them fit the model. Raises ``StartupError``, which is a
    ``NoMemory`` if the device has too little memory now.
    """
    began, cached = time.monotonic(), cached_bytes(source)
    previous = next((info for info in config.previous_measurements if info.id == source.id), None)
    files, runtime = files_of(source, config, previous)
    for risk in runtime.risks:
        log.warning("a setting is risky for this model", model=source.id, why=risk)
    needed, available = check_weights_fit(files, runtime, NoMemory)
    with _explained(files, runtime, needed, available):
        pipeline = load_pipeline(files, runtime.dtype)
        in_memory = time.monotonic()
        family = family_of(pipeline)
        family.check_pipeline(source.location)
        defaults = read_defaults(source, family.model_defaults)
        set_size(source.location, family, defaults.size)
        safety = family.safety_checker(source.location) if config.safety_checker else None
        memory_format = place(family, runtime)
        own_weights(pipeline)
        return ReadModel(
            files=files,
            runtime=runtime,
            previous=previous,
            family=family,
            defaults=defaults,
            safety=safety,
            memory_format=memory_format,
            loras=adapters.offer(source.id, family, memory_format.dtype),
            takes_loras=adapters.may_fit(family),
            revision=revision_of(source, pipeline),
            origin=WeightOrigin.HUB if cached_bytes(source) > cached else WeightOrigin.DISK,
            needed=needed,
            available=available,
            began=began,
            in_memory=in_memory,
        )


def finish_model(read: ReadModel, config: EngineConfig, controlnets: ControlNets) -> LoadedModel:
    """The model that was ``read``, warmed up and measured, with ``pause`` between its calls.

    Raises ``StartupError``.
    """
    with _explained(read.files, read.runtime, read.needed, read.available):
        return _finish(read, config, controlnets)


def _finish(read: ReadModel, config: EngineConfig, controlnets: ControlNets) -> LoadedModel:
    source, family, runtime = read.files.source, read.family, read.runtime
    pipeline, memory_format = family.pipeline, read.memory_format
    if read.files.ip_adapter is not None:
        family.ip_adapter = IpAdapter(pipeline, read.precision)
    family.prepare(memory_format, read.precision, config)
    pause()
    if read.takes_loras:
        family.adapters = model_adapters(
            family, memory_format, runtime.device, read.precision, config.max_loras
        )
        pause()
    controls = controlnets.offer(source.id, family, memory_format, runtime, read.precision)
    if controls is not None:
        family.controls = controls.controls
    decoder = Decoder(family.vae, read.vae_precision)
    measured = measure(family, decoder, memory_format, runtime, config, read.previous)
    family.forms = denoiser_forms(
        source.id, family, memory_format, runtime, config, measured.max_rows
    )
    info = model_info(
        source.id,
        family,
        read.defaults,
        runtime,
        memory_format,
        config,
        revision=read.revision,
        memory=replace(
            measured.memory, control_bytes_per_row=controls.bytes_per_row if controls else 0
        ),
        max_rows=measured.max_rows,
        most_rows=measured.most_rows,
        source=measured.source,
        speed=measured.speed,
        offers={"loras": read.loras, "controls": controls.offers if controls else ()},
        takes_loras=family.adapters is not None,
        takes_ip_adapter=family.ip_adapter is not None,
    )
    log.info(
        "model loaded",
        model=info.id,
        kind=info.kind,
        revision=info.revision,
        device=info.runtime.device,
        dtype=info.runtime.dtype,
        memory_format=info.runtime.memory_format,
        format_rule=info.runtime.format_rule,
        preset=info.runtime.preset,
        preset_rule=info.preset_rule,
        attention=info.runtime.attention,
        autocast=info.runtime.autocast,
        max_rows=measured.max_rows,
        row_limit_source=measured.source,
        bytes_per_row=info.memory.bytes_per_row,
        bytes_per_decode=info.memory.bytes_per_decode,
    )
    model = family.new_model(
        info, memory_format, runtime.device, read.precision, decoder, read.safety
    )
    if slices_get_finer(runtime):
        model.attention = SlicedAttention(family.denoiser)
    if model.previewer is not None and read.safety is None:
        pause()
        model.previewer.fit()
    load = ModelLoad(
        model=info.id,
        load_seconds=read.in_memory - read.began,
        warm_up_seconds=time.monotonic() - read.in_memory,
        bytes_by_component=weights_of(family),
        origin=read.origin,
    )
    nets = controls.controls.nets.values() if controls is not None else ()
    modules = (each for each in (*pipeline.components.values(), *nets))
    weights = tuple(each for each in modules if isinstance(each, torch.nn.Module))
    return LoadedModel(model, load, measured.cache, weights)


@contextmanager
def _explained(files: ModelFiles, runtime: Runtime, needed: int, available: int) -> Iterator[None]:
    """Raise ``NoMemory`` in place of an allocation's error."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        source = files.source
        log.warning("out of memory", model=source.id, why=str(error))
        raise NoMemory(
            f"model {source.location!r} does not fit the memory of {runtime.device}: its weights "
            f"need {needed} of {available} available bytes, and one image does not fit the rest; "
            "use --preset tiny, or fewer models"
        ) from error
