"""Decode the messages that describe models."""

from datetime import UTC

from darkroom.v1 import model_pb2, server_pb2
from darkroom_client._types.model import (
    Guidance,
    Model,
    ModelDefaults,
    ModelLimits,
    ModelLoad,
    ModelRuntime,
    ModelState,
    RowLimitSource,
    SchedulerOffer,
    Task,
)
from darkroom_client._wire.values import decode_float, decode_format, decode_scheduler

_SOURCE_PREFIX = "ROW_LIMIT_SOURCE_"
_STATE_PREFIX = "MODEL_STATE_"


def decode_model(model: model_pb2.Model) -> Model:
    """Decode a model; parts that the server did not set are None."""
    return Model(
        id=model.id,
        ready=model.ready,
        revision=model.revision,
        kind=model.kind,
        defaults=_decode_defaults(model.defaults) if model.HasField("defaults") else None,
        limits=_decode_limits(model.limits) if model.HasField("limits") else None,
        schedulers=tuple(
            SchedulerOffer(
                scheduler=scheduler, min_steps=offer.min_steps, max_steps=offer.max_steps
            )
            for offer in model.schedulers
            if (scheduler := decode_scheduler(offer.scheduler)) is not None
        ),
        runtime=decode_runtime(model.runtime) if model.HasField("runtime") else None,
        optional_fields=tuple(model.optional_fields),
        guidance=_decode_guidance(model.guidance) if model.HasField("guidance") else None,
        unbatched_reason=model.unbatched_reason,
        tasks=tuple(task for task in map(_decode_task, model.tasks) if task is not None),
        state=decode_state(model),
        state_reason=model.state_reason,
        weight_bytes=model.weight_bytes,
        last_used=model.last_used.ToDatetime(UTC) if model.HasField("last_used") else None,
        pinned=model.pinned,
        load=decode_load(model.load) if model.HasField("load") else None,
        files_changed=model.files_changed,
    )


def decode_state(model: model_pb2.Model | server_pb2.ModelStatus) -> ModelState:
    """Decode the state of a model; UNKNOWN if it is newer than this client."""
    if model.state == model_pb2.MODEL_STATE_UNSPECIFIED:
        # A server older than this field has all its models in memory, once they are loaded.
        return ModelState.RESIDENT if model.ready else ModelState.LOADING
    known = model_pb2.ModelState.DESCRIPTOR.values_by_number.get(model.state)
    name = known.name.removeprefix(_STATE_PREFIX) if known else ""
    return ModelState.__members__.get(name, ModelState.UNKNOWN)


def decode_load(load: model_pb2.ModelLoad) -> ModelLoad:
    """Decode how far a load is."""
    return ModelLoad(
        fetched_bytes=load.fetched_bytes,
        fetch_bytes=load.fetch_bytes,
        remaining_seconds=(load.remaining_seconds if load.HasField("remaining_seconds") else None),
    )


def _decode_task(number: model_pb2.Task.ValueType) -> Task | None:
    known = model_pb2.Task.DESCRIPTOR.values_by_number.get(number)
    name = known.name.removeprefix("TASK_") if known else ""
    return Task.__members__.get(name)


def _decode_guidance(guidance: model_pb2.Guidance) -> Guidance:
    return Guidance(
        scale=guidance.scale,
        above=decode_float(guidance.above),
        needs_negative=guidance.needs_negative,
        rows=guidance.rows,
        calls=guidance.calls,
    )


def _decode_defaults(defaults: model_pb2.ModelDefaults) -> ModelDefaults:
    return ModelDefaults(
        width=defaults.width,
        height=defaults.height,
        steps=defaults.steps,
        guidance_scale=decode_float(defaults.guidance_scale),
        scheduler=decode_scheduler(defaults.scheduler),
        format=decode_format(defaults.format),
        quality=defaults.quality,
        true_cfg_scale=(
            decode_float(defaults.true_cfg_scale) if defaults.HasField("true_cfg_scale") else None
        ),
        max_sequence_length=(
            defaults.max_sequence_length if defaults.HasField("max_sequence_length") else None
        ),
        strength=decode_float(defaults.strength) if defaults.HasField("strength") else None,
        inpaint_strength=(
            decode_float(defaults.inpaint_strength)
            if defaults.HasField("inpaint_strength")
            else None
        ),
    )


def _decode_limits(limits: model_pb2.ModelLimits) -> ModelLimits:
    return ModelLimits(
        min_size=limits.min_size,
        max_size=limits.max_size,
        size_multiple=limits.size_multiple,
        max_guidance_scale=decode_float(limits.max_guidance_scale),
        max_image_count=limits.max_image_count,
        max_prompt_bytes=limits.max_prompt_bytes,
        prompt_tokens=limits.prompt_tokens,
        max_rows=limits.max_rows,
        row_limit_source=decode_row_limit_source(limits.row_limit_source),
        max_sequence_length=limits.max_sequence_length,
        max_reference_images=limits.max_reference_images,
        min_reference_side=limits.min_reference_side,
        max_loras=limits.max_loras,
        max_controls=limits.max_controls,
        sizes=tuple((size.width, size.height) for size in limits.sizes),
    )


def decode_row_limit_source(number: model_pb2.RowLimitSource.ValueType) -> RowLimitSource:
    """Decode the source of a row limit; UNKNOWN if it is unset or newer than this client."""
    known = model_pb2.RowLimitSource.DESCRIPTOR.values_by_number.get(number)
    name = known.name.removeprefix(_SOURCE_PREFIX) if known else ""
    return RowLimitSource.__members__.get(name, RowLimitSource.UNKNOWN)


def decode_runtime(runtime: model_pb2.ModelRuntime) -> ModelRuntime:
    """Decode how a model runs."""
    return ModelRuntime(
        device=runtime.device,
        dtype=runtime.dtype,
        preset=runtime.preset,
        attention=runtime.attention,
        slice_size=runtime.slice_size,
        autocast=runtime.autocast,
        vae_tiling=runtime.vae_tiling,
        channels_last=runtime.channels_last,
        fp8_storage=runtime.fp8_storage,
        safety_checker=runtime.safety_checker,
        format_rule=runtime.format_rule,
        preset_rule=runtime.preset_rule,
        denoiser=runtime.denoiser,
        quantization=runtime.quantization,
        offload=runtime.offload,
        vae_channels_last=runtime.vae_channels_last
        if runtime.HasField("vae_channels_last")
        else None,
    )
