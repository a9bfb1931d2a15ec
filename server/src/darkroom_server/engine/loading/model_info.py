"""Describes a model: what requests to it may ask for, and how it runs."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import torch

from darkroom_server.core.adapters import AdapterOffer
from darkroom_server.core.engine_config import EngineConfig
from darkroom_server.core.errors import StartupError
from darkroom_server.core.job import PromptSyntax, Task
from darkroom_server.core.model import MemoryNeeds, ModelDefaults, ModelInfo
from darkroom_server.core.model_runtime import ModelRuntime, ModelSpeed, RowLimitSource
from darkroom_server.core.quantization import Offload
from darkroom_server.engine.components.schedulers import name_of
from darkroom_server.engine.components.weighted_prompts import compel_is_installed
from darkroom_server.engine.conditioning.task_pipelines import default_strength
from darkroom_server.engine.families.base import Family
from darkroom_server.engine.loading.defaults import FILE, Defaults
from darkroom_server.engine.output.replay import library_versions
from darkroom_server.engine.warmup.formats import MemoryFormat, cpu_name
from darkroom_server.engine.warmup.placement import vae_is_channels_last
from darkroom_server.engine.warmup.presets import Runtime

IP_ADAPTER_FIELDS = frozenset({"ip_adapter_image", "ip_adapter_scale"})


def model_info(
    id: str,
    family: Family,
    defaults: Defaults,
    runtime: Runtime,
    memory_format: MemoryFormat,
    config: EngineConfig,
    *,
    revision: str,
    memory: MemoryNeeds,
    max_rows: int,
    most_rows: int,
    source: RowLimitSource,
    speed: ModelSpeed,
    offers: Mapping[str, tuple[AdapterOffer, ...]],
    takes_loras: bool,
    takes_ip_adapter: bool,
) -> ModelInfo:
    """The description of the model of ``family``, named ``id``.

    ``offers``: the "loras" and the "controls" on offer. The rest is what was measured.
    """
    without_extra = frozenset(() if compel_is_installed() else ("prompt_syntax",))
    controls = offers.get("controls", ())
    fields = family.optional_fields | family.image_fields
    fields |= {"loras"} if takes_loras else frozenset()
    fields |= {"controls"} if controls else frozenset()
    fields |= IP_ADAPTER_FIELDS if takes_ip_adapter else frozenset()
    return ModelInfo(
        id=id,
        revision=revision,
        kind=family.pipeline_class,
        defaults=_model_defaults(family, defaults),
        limits=replace(
            family.limits(max_rows),
            row_limit_source=source,
            max_loras=min(config.max_loras, config.max_request_loras) if takes_loras else 0,
            max_reference_images=min(family.most_reference_images, config.max_reference_images)
            if "reference_images" in fields
            else 0,
            max_controls=config.max_controls if controls else 0,
        ),
        schedulers=family.scheduler_offers,
        runtime=_describe(family, runtime, memory_format, safety_checker=config.safety_checker),
        memory=memory,
        speed=speed,
        most_rows=most_rows,
        guidance=family.guidance,
        optional_fields=fields - without_extra,
        fields_without_extra=family.optional_fields & without_extra,
        unbatched_reason=family.unbatched_reason,
        tasks=tuple(family.task_classes),
        strength_rounding=family.strength_rounding,
        adapters=(*offers.get("loras", ()), *controls),
        measured_references=int(family.own_task is Task.EDIT),
    )


def set_size(location: str, family: Family, size: int | None) -> None:
    """Let ``size`` be the default of the model at ``location``. Raises ``StartupError``."""
    if size is None:
        return
    limits = family.limits(0)
    if size % limits.size_multiple:
        raise StartupError(
            f"model {location!r}: size in its {FILE} must be a multiple of {limits.size_multiple}"
        )
    if limits.sizes and (size, size) not in limits.sizes:
        raise StartupError(
            f"model {location!r}: size in its {FILE} is {size}, and a {family.pipeline_class} "
            "makes certain sizes only; leave it out"
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
    family: Family, runtime: Runtime, memory_format: MemoryFormat, *, safety_checker: bool
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
        vae_channels_last=vae_is_channels_last(family, runtime),
        fp8_storage=runtime.fp8_storage,
        safety_checker=safety_checker,
        format_rule=runtime.format_rule,
        preset_rule=runtime.preset_rule,
        machine=_machine(runtime.device),
        quantization=runtime.quantization,
        offload="" if runtime.offload is Offload.NONE else runtime.offload,
    )


@cache
def _machine(device: torch.device) -> str:
    """What computes: the processor, and the versions of the libraries."""
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        processor = f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"
    return f"{processor}, {library_versions(PromptSyntax.PLAIN)}"
