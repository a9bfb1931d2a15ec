"""Loads one model: reads it, places it on its device, measures it there, describes it."""

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import structlog

from darkroom_server.core.engine_config import EngineConfig, ModelSource
from darkroom_server.core.errors import StartupError
from darkroom_server.core.events import ModelLoad
from darkroom_server.core.job import Task
from darkroom_server.core.model import ModelDefaults, ModelInfo
from darkroom_server.core.model_runtime import ModelRuntime
from darkroom_server.engine.adapters.offering import Adapters, model_adapters
from darkroom_server.engine.components.attention import SlicedAttention
from darkroom_server.engine.components.decoder import Decoder
from darkroom_server.engine.components.schedulers import name_of
from darkroom_server.engine.components.weighted_prompts import compel_is_installed
from darkroom_server.engine.conditioning.ip_adapter import IpAdapter
from darkroom_server.engine.conditioning.task_pipelines import default_strength
from darkroom_server.engine.controls.offering import ControlNets
from darkroom_server.engine.failures import is_out_of_memory
from darkroom_server.engine.families.base import Family, Model
from darkroom_server.engine.families.registry import family_of
from darkroom_server.engine.forms.offering import denoiser_forms
from darkroom_server.engine.loading.defaults import FILE, Defaults, read_defaults
from darkroom_server.engine.loading.fit import check_weights_fit
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
from darkroom_server.engine.warmup.placement import place, vae_is_upcast
from darkroom_server.engine.warmup.presets import Runtime, resolve

log = structlog.get_logger(__name__)


def load_model(
    source: ModelSource, config: EngineConfig, adapters: Adapters, controlnets: ControlNets
) -> tuple[Model, ModelLoad, MeasurementCache]:
    """The model of ``source``, on its device, warmed up and measured. Raises ``StartupError``.

    What an earlier engine of this server measured, or an earlier start, is not measured again. The
    cache is that of the model's measurements. ``adapters`` and ``controlnets`` record which of them
    fit the model.
    """
    began = time.monotonic()
    previous = next((info for info in config.previous_measurements if info.id == source.id), None)
    if previous is not None and previous.revision != UNKNOWN:
        # The same weights, even if the hub has newer ones now.
        source = replace(source, revision=previous.revision)
    files = find_model(source, safety_checker=config.safety_checker)
    half = files.family.half
    if files.ip_adapter is not None:
        # Sliced attention would replace the attention that reads the image.
        half = replace(half, slices_attention=False)
    runtime = resolve(config, half)
    for risk in runtime.risks:
        log.warning("a setting is risky for this model", model=source.id, why=risk)
    needed, available = check_weights_fit(files, runtime)
    try:
        return _load(files, runtime, config, adapters, controlnets, previous, began)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        log.warning("out of memory", model=source.id, why=str(error))
        raise StartupError(
            f"model {source.location!r} does not fit the memory of {runtime.device}: its weights "
            f"need {needed} of {available} available bytes, and one image does not fit the rest; "
            "use --preset tiny, or fewer models"
        ) from error


def _load(
    files: ModelFiles,
    runtime: Runtime,
    config: EngineConfig,
    adapters: Adapters,
    controlnets: ControlNets,
    previous: ModelInfo | None,
    began: float,
) -> tuple[Model, ModelLoad, MeasurementCache]:
    source = files.source
    pipeline = load_pipeline(files, runtime.dtype)
    in_memory = time.monotonic()
    family = family_of(pipeline)
    family.check_pipeline(source.location)
    defaults = read_defaults(source, family.model_defaults)
    _set_size(source, family, defaults.size)
    safety = family.safety_checker(source.location) if config.safety_checker else None
    memory_format = place(family, runtime)

    def precision() -> AbstractContextManager[Any]:
        return runtime.precision(memory_format.dtype)

    def vae_precision() -> AbstractContextManager[Any]:
        return nullcontext() if vae_is_upcast(pipeline) else precision()

    if files.ip_adapter is not None:
        family.ip_adapter = IpAdapter(pipeline, precision)
    family.prepare(memory_format, precision, config)
    offered = adapters.offer(source.id, family, memory_format.dtype)
    if adapters.may_fit(family):
        family.adapters = model_adapters(
            family, memory_format, runtime.device, precision, config.max_loras
        )
    takes_loras = family.adapters is not None
    controls = controlnets.offer(source.id, family, memory_format, runtime, precision)
    if controls is not None:
        family.controls = controls.controls
        offered += controls.offers
    decoder = Decoder(family.vae, vae_precision)
    without_extra = frozenset(() if compel_is_installed() else ("prompt_syntax",))
    fields = family.optional_fields | family.image_fields
    fields |= {"loras"} if takes_loras else set()
    fields |= {"controls"} if controls else set()
    measured = measure(family, decoder, memory_format, runtime, config, previous)
    family.forms = denoiser_forms(
        source.id, family, memory_format, runtime, config, measured.max_rows
    )
    info = ModelInfo(
        id=source.id,
        revision=revision_of(source, pipeline),
        kind=family.pipeline_class,
        defaults=_model_defaults(family, defaults),
        limits=replace(
            family.limits(measured.max_rows),
            row_limit_source=measured.source,
            max_loras=min(config.max_loras, config.max_request_loras) if takes_loras else 0,
            max_reference_images=min(family.most_reference_images, config.max_reference_images)
            if "reference_images" in fields
            else 0,
            max_controls=config.max_controls if controls else 0,
        ),
        schedulers=family.scheduler_offers,
        runtime=_describe(runtime, memory_format, safety_checker=config.safety_checker),
        memory=replace(
            measured.memory, control_bytes_per_row=controls.bytes_per_row if controls else 0
        ),
        speed=measured.speed,
        most_rows=measured.most_rows,
        guidance=family.guidance,
        optional_fields=fields - without_extra,
        fields_without_extra=family.optional_fields & without_extra,
        unbatched_reason=family.unbatched_reason,
        tasks=tuple(family.task_classes),
        strength_rounding=family.strength_rounding,
        adapters=offered,
        measured_references=int(family.own_task is Task.EDIT),
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
    model = family.new_model(info, memory_format, runtime.device, precision, decoder, safety)
    if slices_get_finer(runtime):
        model.attention = SlicedAttention(family.denoiser)
    if model.previewer is not None and safety is None:
        model.previewer.fit()
    load = ModelLoad(
        model=info.id,
        load_seconds=in_memory - began,
        warm_up_seconds=time.monotonic() - in_memory,
        bytes_by_component=weights_of(family),
    )
    return model, load, measured.cache


def _set_size(source: ModelSource, family: Family, size: int | None) -> None:
    if size is None:
        return
    limits = family.limits(0)
    if size % limits.size_multiple:
        raise StartupError(
            f"model {source.location!r}: size in its {FILE} must be a multiple of "
            f"{limits.size_multiple}"
        )
    if limits.sizes and (size, size) not in limits.sizes:
        raise StartupError(
            f"model {source.location!r}: size in its {FILE} is {size}, and a "
            f"{family.pipeline_class} makes certain sizes only; leave it out"
        )
    family.chosen_size = size


def _model_defaults(family: Family, defaults: Defaults) -> ModelDefaults:
    strengths = {task: default_strength(each) for task, each in family.task_classes.items()}
    return ModelDefaults(
        width=family.size,
        height=family.size,
        steps=defaults.steps,
        guidance_scale=float(defaults.guidance_scale),
        scheduler=name_of(family.pipeline.scheduler),
        true_cfg_scale=float(defaults.true_cfg_scale),
        max_sequence_length=family.default_sequence_length,
        strength=strengths.get(Task.IMAGE_TO_IMAGE),
        inpaint_strength=strengths.get(Task.INPAINT),
    )


def _describe(
    runtime: Runtime, memory_format: MemoryFormat, *, safety_checker: bool
) -> ModelRuntime:
    return ModelRuntime(
        device=str(runtime.device),
        dtype=runtime.dtype_name,
        preset=runtime.preset,
        attention=runtime.attention,
        slice_size=runtime.slice_size,
        autocast=runtime.autocast,
        vae_tiling=runtime.vae_tiling,
        channels_last=memory_format.channels_last,
        fp8_storage=runtime.fp8_storage,
        safety_checker=safety_checker,
        format_rule=runtime.format_rule,
        preset_rule=runtime.preset_rule,
    )
