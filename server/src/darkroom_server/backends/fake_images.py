"""The fake engine's images: flat colours."""

import hashlib

import numpy as np
import numpy.typing as npt

from darkroom_server.core.events import EncodedImage, PreviewReady, Replay
from darkroom_server.core.inputs import InputImage
from darkroom_server.core.job import Job
from darkroom_server.core.model import ModelInfo
from darkroom_server.core.record import embedded_record
from darkroom_server.engine.output.formats import (
    encode_image,
    encode_preview,
    preview_size,
    sha256_of,
)

FLAGGED = "[flagged]"
"""A prompt with this text generates images that are withheld."""


def fake_image(job: Job, index: int, model: ModelInfo, rows: int) -> EncodedImage:
    """Image ``index`` of ``job``, of ``rows`` rows: one flat colour, derived from its seed.

    With ``job.image``, the colour replaces the white part of its mask, or as much of all of it as
    ``strength`` says.
    """
    seed = job.seed_of(index)
    pixels = np.full((job.height, job.width, 3), _colour(seed), np.uint8)
    if job.image is not None:
        shown = _array(job.image)
        part = _array(job.mask_image) / 255 if job.mask_image is not None else job.strength
        pixels = np.round(shown * (1 - part) + pixels * part).astype(np.uint8)
    flagged = FLAGGED in job.prompt
    replay = Replay(
        scheduler_class="FakeScheduler",
        scheduler_config_json="{}",
        device="cpu",
        library_versions={"darkroom-server": "fake"},
        rows_in_last_pass=rows,
        pixels_sha256=sha256_of(pixels),
    )
    record = embedded_record(job, seed, model, replay) if job.embed_record else ""
    return EncodedImage(
        data=b"" if flagged else encode_image(pixels, job.format, job.quality, record),
        format=job.format,
        width=job.width,
        height=job.height,
        seed=seed,
        prompt_truncated=len(job.prompt.split()) > 75,
        flagged=flagged,
        replay=replay,
    )


def fake_preview(job: Job, index: int, step: int) -> PreviewReady:
    """The preview of image ``index`` of ``job`` after ``step`` steps: the same colour."""
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


def _array(image: InputImage) -> npt.NDArray[np.uint8]:
    array = np.frombuffer(image.pixels, np.uint8)
    return array.reshape(image.height, image.width, image.channels)


def _colour(seed: int) -> list[int]:
    return list(hashlib.sha256(str(seed).encode()).digest()[:3])
