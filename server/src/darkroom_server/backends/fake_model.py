"""The fake engine's model."""

from darkroom_server.core.job import SchedulerName
from darkroom_server.core.model import (
    MemoryNeeds,
    ModelDefaults,
    ModelInfo,
    ModelLimits,
    ModelRuntime,
)
from darkroom_server.engine.components.scheduler_table import SCHEDULERS


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
