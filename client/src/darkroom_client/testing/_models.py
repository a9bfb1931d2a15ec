"""The fake server's models: their description, and the defaults of their requests."""

import struct
from collections.abc import Iterable
from dataclasses import asdict, replace

from darkroom.v1 import generation_pb2, model_pb2
from darkroom_client._errors import ModelUnusable, Unavailable
from darkroom_client._types.enums import ImageFormat, Scheduler
from darkroom_client._types.model import (
    OPTIONAL_FIELDS,
    Guidance,
    Model,
    ModelDefaults,
    ModelLimits,
    ModelRuntime,
    ModelState,
    RowLimitSource,
    SchedulerOffer,
    Task,
)
from darkroom_client._wire.values import encode_format, encode_scheduler

RETRY_SECONDS = 0.05
MAX_STEPS = 1000
MAX_LCM_STEPS = 50
MAX_SEQUENCE_LENGTH = 512
MAX_INPUTS = 4
TASK_FIELDS = {
    Task.IMAGE_TO_IMAGE: "image",
    Task.INPAINT: "mask_image",
    Task.EDIT: "reference_images",
}

_FAKE = Model(
    id="demo",
    ready=True,
    revision="fake",
    kind="StableDiffusionPipeline",
    defaults=ModelDefaults(
        width=64,
        height=64,
        steps=4,
        guidance_scale=7.5,
        scheduler=Scheduler.EULER,
        format=ImageFormat.PNG,
        quality=90,
    ),
    limits=ModelLimits(
        min_size=8,
        max_size=1024,
        size_multiple=8,
        max_guidance_scale=50.0,
        max_image_count=16,
        max_prompt_bytes=8192,
        prompt_tokens=77,
        max_rows=8,
        row_limit_source=RowLimitSource.SET,
    ),
    schedulers=tuple(
        SchedulerOffer(
            scheduler=scheduler,
            min_steps=1,
            max_steps=MAX_LCM_STEPS if scheduler is Scheduler.LCM else MAX_STEPS,
        )
        for scheduler in Scheduler
    ),
    runtime=ModelRuntime(
        device="fake",
        dtype="float32",
        preset="fast",
        attention="sdpa",
        slice_size="",
        autocast=False,
        vae_tiling=False,
        channels_last=False,
        fp8_storage=False,
        safety_checker=False,
        denoiser="eager",
        vae_channels_last=False,
    ),
    guidance=Guidance(scale="guidance_scale", above=1.0, needs_negative=False, rows=2, calls=1),
    state=ModelState.RESIDENT,
    weight_bytes=2**30,
)


def fake_model(
    id: str = "demo",
    *,
    optional_fields: Iterable[str] = ("negative_prompt", "guidance_scale", "preview"),
    state: ModelState = ModelState.RESIDENT,
    state_reason: str = "",
) -> Model:
    """A model of 8 to 1024 pixels (64 by default) that offers every scheduler.

    ``optional_fields``: what it takes of the fields that not every model takes, such as
    ``true_cfg_scale``; a request that sets another of them is rejected. ``state``: an AVAILABLE or
    HOST one is loaded by its first request or by ``Client.load_model``; requests for a LOADING one
    wait until ``Client.load_model``, and a FAILED one rejects them until then, as ``ModelUnusable``
    with ``state_reason``. Change the rest with ``dataclasses.replace``, for
    ``FakeServer(models=[...])``: a LOADING one without ``defaults`` and ``limits`` is not described
    yet, and rejects requests as ``Unavailable``. Raises ``ValueError`` for a field that is not
    optional.
    """
    given = set(optional_fields)
    if unknown := sorted(given.difference(OPTIONAL_FIELDS)):
        raise ValueError(f"{', '.join(unknown)}: not among {', '.join(OPTIONAL_FIELDS)}")
    takes = tuple(name for name in OPTIONAL_FIELDS if name in given)
    defaults, limits = _FAKE.defaults, _FAKE.limits
    assert defaults is not None
    assert limits is not None
    if "true_cfg_scale" in takes:
        defaults = replace(defaults, true_cfg_scale=1.0)
    if "max_sequence_length" in takes:
        defaults = replace(defaults, max_sequence_length=MAX_SEQUENCE_LENGTH)
        limits = replace(limits, max_sequence_length=MAX_SEQUENCE_LENGTH)
    if "strength" in takes:
        defaults = replace(defaults, strength=0.8, inpaint_strength=1.0)
    limits = replace(
        limits,
        max_reference_images=MAX_INPUTS if "reference_images" in takes else 0,
        max_loras=MAX_INPUTS if "loras" in takes else 0,
        max_controls=MAX_INPUTS if "controls" in takes else 0,
    )
    tasks = [Task.TEXT_TO_IMAGE]
    tasks += [task for task, name in TASK_FIELDS.items() if name in takes]
    model = replace(
        _FAKE,
        id=id,
        optional_fields=takes,
        defaults=defaults,
        limits=limits,
        tasks=tuple(tasks),
    )
    return model if state is ModelState.RESIDENT else off_device(model, state, state_reason)


def on_device(model: Model) -> Model:
    """``model`` once it is loaded; what the server did not know before is that of ``fake_model``.

    A loaded one stays as it is.
    """
    if model.ready:
        return replace(model, files_changed=False)
    defaults, limits = model.defaults or _FAKE.defaults, model.limits or _FAKE.limits
    assert limits is not None
    assert _FAKE.limits is not None
    if not limits.max_rows:
        source = _FAKE.limits.row_limit_source
        limits = replace(limits, max_rows=_FAKE.limits.max_rows, row_limit_source=source)
    return replace(
        model,
        ready=True,
        state=ModelState.RESIDENT,
        state_reason="",
        load=None,
        files_changed=False,
        revision=model.revision or _FAKE.revision,
        kind=model.kind or _FAKE.kind,
        defaults=defaults,
        limits=limits,
        schedulers=model.schedulers or _FAKE.schedulers,
        runtime=model.runtime or _FAKE.runtime,
    )


def off_device(model: Model, state: ModelState, state_reason: str = "") -> Model:
    """``model`` as the server describes it in another ``state`` than RESIDENT."""
    limits = model.limits
    if limits is not None:
        limits = replace(limits, max_rows=0, row_limit_source=RowLimitSource.UNKNOWN)
    return replace(
        model,
        ready=False,
        state=state,
        state_reason=state_reason,
        limits=limits,
        runtime=None,
        load=None,
    )


def encode_model(model: Model) -> model_pb2.Model:
    """Encode ``model`` as the server sends it; parts that are None stay unset."""
    message = model_pb2.Model(
        id=model.id,
        revision=model.revision,
        kind=model.kind,
        ready=model.ready,
        optional_fields=model.optional_fields,
        unbatched_reason=model.unbatched_reason,
        tasks=[model_pb2.Task.Value(f"TASK_{task.name}") for task in model.tasks],
        state=_encode_state(model.state),
        state_reason=model.state_reason,
        weight_bytes=model.weight_bytes,
        pinned=model.pinned,
        files_changed=model.files_changed,
    )
    if model.last_used is not None:
        message.last_used.FromDatetime(model.last_used)
    if model.load is not None:
        message.load.CopyFrom(model_pb2.ModelLoad(**asdict(model.load)))
    if model.defaults is not None:
        defaults = model.defaults
        message.defaults.CopyFrom(
            model_pb2.ModelDefaults(
                width=defaults.width,
                height=defaults.height,
                steps=defaults.steps,
                guidance_scale=defaults.guidance_scale,
                scheduler=encode_scheduler(defaults.scheduler),
                format=encode_format(defaults.format),
                quality=defaults.quality,
                true_cfg_scale=defaults.true_cfg_scale,
                max_sequence_length=defaults.max_sequence_length,
                strength=defaults.strength,
                inpaint_strength=defaults.inpaint_strength,
            )
        )
    if model.limits is not None:
        limits = model.limits
        message.limits.CopyFrom(
            model_pb2.ModelLimits(
                min_size=limits.min_size,
                max_size=limits.max_size,
                size_multiple=limits.size_multiple,
                max_guidance_scale=limits.max_guidance_scale,
                max_image_count=limits.max_image_count,
                max_prompt_bytes=limits.max_prompt_bytes,
                prompt_tokens=limits.prompt_tokens,
                max_rows=limits.max_rows,
                row_limit_source=_encode_source(limits.row_limit_source),
                max_sequence_length=limits.max_sequence_length,
                max_reference_images=limits.max_reference_images,
                min_reference_side=limits.min_reference_side,
                max_loras=limits.max_loras,
                max_controls=limits.max_controls,
                sizes=[model_pb2.ImageSize(width=w, height=h) for w, h in limits.sizes],
            )
        )
    if model.guidance is not None:
        message.guidance.CopyFrom(model_pb2.Guidance(**asdict(model.guidance)))
    for offer in model.schedulers:
        message.schedulers.add(
            scheduler=encode_scheduler(offer.scheduler),
            min_steps=offer.min_steps,
            max_steps=offer.max_steps,
        )
    if model.runtime is not None:
        runtime = model.runtime
        message.runtime.CopyFrom(
            model_pb2.ModelRuntime(
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
                vae_channels_last=runtime.vae_channels_last,
            )
        )
    return message


def _encode_state(state: ModelState) -> model_pb2.ModelState.ValueType:
    name = "UNSPECIFIED" if state is ModelState.UNKNOWN else state.name
    return model_pb2.ModelState.Value(f"MODEL_STATE_{name}")


def _encode_source(source: RowLimitSource) -> model_pb2.RowLimitSource.ValueType:
    name = "UNSPECIFIED" if source is RowLimitSource.UNKNOWN else source.name
    return model_pb2.RowLimitSource.Value(f"ROW_LIMIT_SOURCE_{name}")


def described(model: Model) -> tuple[ModelDefaults, ModelLimits]:
    """The defaults and limits of ``model``; raises ``ModelUnusable`` or ``Unavailable``."""
    if model.state is ModelState.FAILED:
        raise unusable(model.id, model.state_reason)
    if model.defaults is None or model.limits is None:
        raise Unavailable(
            f"model {model.id!r} is loading", reason="MODEL_LOADING", retry_after=RETRY_SECONDS
        )
    return model.defaults, model.limits


def unusable(id: str, why: str) -> ModelUnusable:
    """The error of a request for a model that cannot be loaded."""
    return ModelUnusable(f"model {id!r} cannot be loaded: {why}")


def fill_defaults(
    request: generation_pb2.GenerateRequest, model: Model
) -> generation_pb2.GenerateRequest:
    """``request`` with the defaults of ``model`` in its unset fields, but the seed."""
    defaults = described(model)[0]
    filled = generation_pb2.GenerateRequest(
        width=defaults.width,
        height=defaults.height,
        steps=defaults.steps,
        guidance_scale=(
            defaults.guidance_scale if "guidance_scale" in model.optional_fields else None
        ),
        true_cfg_scale=defaults.true_cfg_scale,
        max_sequence_length=defaults.max_sequence_length,
        strength=_strength_of(request, defaults),
        image_count=1,
        scheduler=encode_scheduler(defaults.scheduler),
        format=encode_format(defaults.format),
    )
    filled.MergeFrom(request)
    filled.model = model.id
    return filled


def as_float32(value: float) -> float:
    """``value`` rounded to 32 bits, as on the wire."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


def _strength_of(request: generation_pb2.GenerateRequest, defaults: ModelDefaults) -> float | None:
    """How much of the request's image is replaced if it does not say so."""
    if not request.HasField("image"):
        return None
    return defaults.inpaint_strength if request.HasField("mask_image") else defaults.strength
