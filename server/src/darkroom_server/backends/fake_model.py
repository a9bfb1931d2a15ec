"""The fake engine's model, and the images of one colour that it generates."""

import hashlib

import numpy as np

from darkroom_server.core.events import EncodedImage, PreviewReady, Replay
from darkroom_server.core.job import Job, SchedulerName
from darkroom_server.core.model import (
    MemoryNeeds,
    ModelDefaults,
    ModelInfo,
    ModelLimits,
    ModelRuntime,
)
from darkroom_server.engine.components.scheduler_table import SCHEDULERS
from darkroom_server.engine.output.formats import (
    encode_image,
    encode_preview,
    preview_size,
    sha256_of,
)

FLAGGED = "[flagged]"
"""If a prompt contains this, its image is withheld."""


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


def fake_image(job: Job, index: int) -> EncodedImage:
    """Image ``index`` of ``job``: one colour, which its seed decides."""
    seed = job.seed_of(index)
    pixels = np.full((job.height, job.width, 3), _colour(seed), np.uint8)
    flagged = FLAGGED in job.prompt
    return EncodedImage(
        data=b"" if flagged else encode_image(pixels, job.format, job.quality),
        format=job.format,
        width=job.width,
        height=job.height,
        seed=seed,
        prompt_truncated=len(job.prompt.split()) > 75,
        flagged=flagged,
        replay=Replay(
            scheduler_class="FakeScheduler",
            scheduler_config_json="{}",
            device="cpu",
            library_versions={"darkroom-server": "fake"},
            rows_in_last_pass=job.rows_per_image,
            pixels_sha256=sha256_of(pixels),
        ),
    )


def fake_preview(job: Job, index: int, step: int) -> PreviewReady:
    """The preview of image ``index`` of ``job`` after ``step`` steps, in the image's colour."""
    size = preview_size(job.width, job.height)
    pixels = np.full((8, 8, 3), _colour(job.seed_of(index)), np.uint8)
    return PreviewReady(
        job_id=job.id,
        image_index=index,
        step=step,
        data=encode_preview(pixels, size, job.preview_format),
        format=job.preview_format,
        width=size[0],
        height=size[1],
    )


def _colour(seed: int) -> list[int]:
    return list(hashlib.sha256(str(seed).encode()).digest()[:3])
