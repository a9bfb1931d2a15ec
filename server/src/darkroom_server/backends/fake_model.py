"""The fake engine's models."""

from dataclasses import dataclass, replace

from darkroom_server.core.adapters import AdapterKind, AdapterOffer
from darkroom_server.core.catalog import ModelDescription, WeightOrigin
from darkroom_server.core.job import Job, SchedulerName, Task
from darkroom_server.core.model import Guidance, MemoryNeeds, ModelDefaults, ModelInfo, ModelLimits
from darkroom_server.core.model_events import ModelLoad
from darkroom_server.core.model_runtime import ModelRuntime
from darkroom_server.engine.components.scheduler_table import SCHEDULERS


@dataclass(slots=True)
class FakeResident:
    """A job in the engine; ``rows`` of each image in a batch; ``encoded``: its prompts were."""

    job: Job
    model: ModelInfo
    images: list[int]
    rows: int
    step: int = 0
    encoded: bool = False


def fake_model(id: str = "demo") -> ModelInfo:
    """A small model: 64 to 2048 pixels in steps of 8; about 1400² pixels fit its memory."""
    return ModelInfo(
        id=id,
        revision="fake",
        kind="StableDiffusionPipeline",
        defaults=ModelDefaults(
            width=64, height=64, steps=4, guidance_scale=7.5, scheduler=SchedulerName.DDIM
        ),
        limits=ModelLimits(
            min_size=64, max_size=2048, size_multiple=8, prompt_tokens=77, max_rows=8
        ),
        schedulers=(
            SCHEDULERS[SchedulerName.DDIM].offer(max_steps=1000),
            SCHEDULERS[SchedulerName.PNDM].offer(max_steps=1000),
            SCHEDULERS[SchedulerName.EULER].offer(max_steps=1000),
            SCHEDULERS[SchedulerName.DPMPP_2M].offer(min_steps=2, max_steps=1000),
            SCHEDULERS[SchedulerName.LCM].offer(max_steps=50),
        ),
        runtime=ModelRuntime(
            device="cpu",
            dtype="float32",
            preset="fast",
            attention="sdpa",
            slice_size="",
            autocast=False,
            vae_tiling=False,
            channels_last=False,
            vae_channels_last=False,
            fp8_storage=False,
            safety_checker=False,
        ),
        memory=MemoryNeeds(
            pixels=64 * 64,
            bytes_per_row=1024**2,
            bytes_per_decode=1024**2,
            available_bytes=1024**3,
        ),
    )


def fake_flow_model(id: str = "flow") -> ModelInfo:
    """A small model with embedded guidance, like FLUX.1; what it takes differs from the other's.

    Its guided images need a negative prompt, and take one row in each of two denoiser calls. It
    takes prompts of 512 tokens, and a second prompt; its schedulers are those for flow matching.
    """
    model = fake_model(id)
    return replace(
        model,
        kind="FluxPipeline",
        defaults=replace(
            model.defaults,
            guidance_scale=3.5,
            scheduler=SchedulerName.FLOW_MATCH_EULER,
            true_cfg_scale=1.0,
            max_sequence_length=512,
        ),
        limits=replace(model.limits, max_sequence_length=512),
        schedulers=(
            SCHEDULERS[SchedulerName.FLOW_MATCH_EULER].offer(max_steps=1000),
            SCHEDULERS[SchedulerName.FLOW_MATCH_HEUN].offer(min_steps=2, max_steps=1000),
        ),
        guidance=Guidance(scale="true_cfg_scale", needs_negative=True, rows=1, calls=2),
        optional_fields=frozenset(
            {
                "negative_prompt",
                "empty_negative_prompt",
                "guidance_scale",
                "true_cfg_scale",
                "max_sequence_length",
                "prompt_2",
                "negative_prompt_2",
            }
        ),
    )


def fake_image_model(id: str = "demo") -> ModelInfo:
    """Like ``fake_model``, and it takes all fields, for all tasks.

    It has the LoRA adapter "outline" and the ControlNet "pose".
    """
    model = fake_model(id)
    return replace(
        model,
        defaults=replace(model.defaults, strength=0.8),
        limits=replace(model.limits, max_reference_images=4, max_loras=4, max_controls=4),
        optional_fields=model.optional_fields
        | {
            "image",
            "mask_image",
            "strength",
            "reference_images",
            "loras",
            "controls",
            "ip_adapter_image",
            "ip_adapter_scale",
        },
        tasks=tuple(Task),
        adapters=(
            AdapterOffer(id="outline", rank=4, bytes=500),
            AdapterOffer(id="pose", rank=0, bytes=900, kind=AdapterKind.CONTROLNET, cost=0.5),
        ),
    )


def fake_load(id: str, weight_bytes: int, *, in_host: bool) -> ModelLoad:
    """A load of a model, from the host's memory or from disk."""
    return ModelLoad(
        model=id,
        load_seconds=0.1 if in_host else 0.5,
        warm_up_seconds=0.5,
        bytes_by_component={"unet": weight_bytes},
        origin=WeightOrigin.HOST if in_host else WeightOrigin.DISK,
    )


def fake_description(
    info: ModelInfo, weight_bytes: int, stamp: str, reason: str
) -> ModelDescription:
    """A model as it is described before its first load."""
    return ModelDescription(
        id=info.id,
        info=replace(info, revision=""),
        weight_bytes=weight_bytes,
        reason=reason,
        stamp=stamp,
    )
