"""Loads one model: reads it, places it on its device, measures it there, describes it."""

import time
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import structlog
import torch

from darkroom_server.core.engine_config import Dtype, EngineConfig, ModelSource
from darkroom_server.core.events import ModelLoad
from darkroom_server.core.job import SchedulerName
from darkroom_server.core.model import (
    MemoryNeeds,
    ModelDefaults,
    ModelInfo,
    ModelRuntime,
    ModelSpeed,
)
from darkroom_server.engine.components.decoder import Decoder
from darkroom_server.engine.components.schedulers import name_of, offers
from darkroom_server.engine.families.base import Family, Model
from darkroom_server.engine.families.registry import family_of
from darkroom_server.engine.loading.defaults import read_defaults
from darkroom_server.engine.loading.pipeline import load_pipeline, weights_of
from darkroom_server.engine.loading.revision import UNKNOWN, revision_of
from darkroom_server.engine.warmup.placement import (
    denoiser_forward,
    measure_decode,
    measure_memory,
    place,
)
from darkroom_server.engine.warmup.presets import DTYPES, Runtime
from darkroom_server.engine.warmup.profiler import ROWS, MemoryFormat, best_rows, measure_rows

log = structlog.get_logger(__name__)


def load_model(
    source: ModelSource, runtime: Runtime, config: EngineConfig
) -> tuple[Model, ModelLoad]:
    """The model of ``source``, on its device, warmed up and measured. Raises ``StartupError``.

    What an earlier engine of this server measured is not measured again.
    """
    began = time.monotonic()
    previous = next((info for info in config.previous_measurements if info.id == source.id), None)
    if previous is not None and previous.revision != UNKNOWN:
        # The same weights, even if the hub has newer ones now.
        source = replace(source, revision=previous.revision)
    dtype = runtime.dtype or torch.float32
    pipeline = load_pipeline(source, dtype, safety_checker=config.safety_checker)
    in_memory = time.monotonic()
    family = family_of(pipeline)
    family.check_pipeline(source.location)
    safety = family.safety_checker(source.location) if config.safety_checker else None
    memory_format = place(family, runtime, _format_of(previous))

    def precision() -> AbstractContextManager[Any]:
        return runtime.precision(memory_format.dtype)

    decoder = Decoder(pipeline.vae, precision)
    memory, max_rows, speed = _measure(family, decoder, memory_format, runtime, config, previous)
    info = ModelInfo(
        id=source.id,
        revision=revision_of(source, pipeline),
        kind=family.pipeline_class,
        defaults=_defaults(source, family),
        limits=family.limits(max_rows),
        schedulers=offers(dict(pipeline.scheduler.config)),
        runtime=_describe(runtime, memory_format, safety_checker=config.safety_checker),
        memory=memory,
        speed=speed,
    )
    log.info(
        "model loaded",
        model=info.id,
        revision=info.revision,
        device=info.runtime.device,
        dtype=info.runtime.dtype,
        preset=info.runtime.preset,
        max_rows=max_rows,
        bytes_per_row=memory.bytes_per_row,
        bytes_per_decode=memory.bytes_per_decode,
    )
    load = ModelLoad(
        model=info.id,
        load_seconds=in_memory - began,
        warm_up_seconds=time.monotonic() - in_memory,
        bytes_by_component=weights_of(family),
    )
    return family.new_model(info, memory_format, runtime.device, precision, decoder, safety), load


def _measure(
    family: Family,
    decoder: Decoder,
    memory_format: MemoryFormat,
    runtime: Runtime,
    config: EngineConfig,
    previous: ModelInfo | None,
) -> tuple[MemoryNeeds, int, ModelSpeed]:
    """The memory that work needs, the row limit, and the speed; warms the model up too."""
    forward = denoiser_forward(family, family.denoiser, memory_format, runtime)
    if previous is not None:
        forward(2)
        return previous.memory, previous.limits.max_rows, previous.speed
    memory = measure_memory(forward, family, decoder, memory_format, runtime)
    fit = memory.rows_that_fit(family.size, family.size)
    seconds = measure_rows(forward, min(fit, config.max_rows or max(ROWS)))
    max_rows = best_rows(seconds)
    decode = measure_decode(family, decoder, memory_format, runtime)
    return memory, max_rows, ModelSpeed(passes=tuple(seconds.items()), decode=decode)


def _format_of(previous: ModelInfo | None) -> MemoryFormat | None:
    if previous is None:
        return None
    return MemoryFormat(DTYPES[Dtype(previous.runtime.dtype)], previous.runtime.channels_last)


def _defaults(source: ModelSource, family: Family) -> ModelDefaults:
    defaults = read_defaults(source, family.defaults)
    own = family.pipeline.scheduler
    scheduler = name_of(own)
    if scheduler is None:
        scheduler = SchedulerName.DDIM
        log.warning(
            "the model's own scheduler is not offered",
            scheduler=type(own).__name__,
            default=scheduler,
        )
    return ModelDefaults(
        width=family.size,
        height=family.size,
        steps=defaults.steps,
        guidance_scale=float(defaults.guidance_scale),
        scheduler=scheduler,
    )


def _describe(
    runtime: Runtime, memory_format: MemoryFormat, *, safety_checker: bool
) -> ModelRuntime:
    return ModelRuntime(
        device=str(runtime.device),
        dtype=str(memory_format.dtype).removeprefix("torch."),
        preset=runtime.preset,
        attention=runtime.attention,
        slice_size=runtime.slice_size,
        autocast=runtime.autocast,
        vae_tiling=runtime.vae_tiling,
        channels_last=memory_format.channels_last,
        fp8_storage=runtime.fp8_storage,
        safety_checker=safety_checker,
    )
