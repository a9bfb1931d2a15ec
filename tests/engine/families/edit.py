"""The families that edit reference images, tiny, in the real folder format."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import transformers
from diffusers.pipelines.flux import pipeline_flux_kontext
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image

from bench.tiny_families import flux, flux_2, qwen_image
from bench.tiny_families.case import FamilyCase, mixed_jobs
from bench.tiny_families.parts import qwen_tokenizer, set_size
from bench.tiny_families.qwen_image import qwen_image_parts
from darkroom_server.core.inputs import InputImage
from darkroom_server.core.job import Job
from darkroom_server.engine.families.qwen_image_edit import ImageProcessor

from ..folders import edit_index
from .image_tasks import picture

AREA = 64 * 64
"""Of the reference images as tiny models see them; real ones scale them to a megapixel."""


def shrink_references(patch: pytest.MonkeyPatch) -> None:
    """Let diffusers scale reference images to the area of tiny models."""
    sizes = [(48, 96), (64, 64), (96, 48)]
    patch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", sizes)
    own = pipeline_qwenimage_edit.calculate_dimensions
    patch.setattr(
        pipeline_qwenimage_edit, "calculate_dimensions", lambda _, ratio: own(AREA, ratio)
    )
    for name in ("CONDITION_IMAGE_SIZE", "VAE_IMAGE_SIZE"):
        patch.setattr(pipeline_qwenimage_edit_plus, name, AREA)


def references(*seeds: int) -> dict[str, tuple[InputImage, ...]]:
    """The fields of a job with reference images."""
    return {"reference_images": tuple(picture(seed) for seed in seeds)}


def images_of(job: Job) -> Mapping[str, Any]:
    """The argument of diffusers' pipelines for the reference images of ``job``."""
    images = [
        Image.frombytes("RGB", (each.width, each.height), each.pixels)
        for each in job.reference_images
    ]
    if not images:
        return {}
    return {"image": images if len(images) > 1 else images[0]}


def write_kontext(folder: Path) -> Path:
    """A FLUX.1 Kontext."""
    return flux.write_flux(
        folder,
        kind="FluxKontextPipeline",
        guidance_embeds=True,
        use_dynamic_shifting=True,
        shift=3.0,
    )


def _write_qwen_image_edit(folder: Path, kind: str, **transformer: Any) -> Path:
    tokenizer = qwen_tokenizer("Picture 1: Describe the key features of the input image")
    tokenizer.add_tokens(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"], True)
    processor = ImageProcessor(transformers.Qwen2VLImageProcessorPil(), tokenizer)
    parts = qwen_image_parts(tokenizer, **transformer)
    getattr(diffusers, kind)(**parts, processor=processor).save_pretrained(folder)
    # As in real folders.
    edit_index(folder, processor=["transformers", "Qwen2VLProcessor"])
    return set_size(folder)


def write_qwen_image_edit(folder: Path) -> Path:
    """A Qwen-Image-Edit."""
    return _write_qwen_image_edit(folder, "QwenImageEditPipeline")


def write_qwen_image_edit_plus(folder: Path) -> Path:
    """A Qwen-Image-Edit-Plus, whose transformer has a second timestep of zero as in 2511."""
    return _write_qwen_image_edit(folder, "QwenImageEditPlusPipeline", zero_cond_t=True)


def kontext_call(job: Job) -> dict[str, Any]:
    """The arguments with which a user of diffusers asks Kontext for ``job``."""
    return {**flux.call(job), **images_of(job), "max_area": job.width * job.height}


def flux_2_call(job: Job) -> dict[str, Any]:
    """The arguments with which a user of diffusers asks FLUX.2 for ``job``."""
    return {**flux_2.call(job), **images_of(job)}


def qwen_image_edit_call(job: Job) -> dict[str, Any]:
    """The arguments with which a user of diffusers asks Qwen-Image-Edit for ``job``."""
    call = {n: v for n, v in qwen_image.call(job).items() if n != "max_sequence_length"}
    return {**call, **images_of(job)}


SHORT = {"max_sequence_length": 32}
SHORT_CHAT = {"max_sequence_length": 48}
GUIDED = {"true_cfg_scale": 3.0, "negative_prompt": "blue"}
SAME = {"prompt": "a red ring"}

KONTEXT = mixed_jobs(
    {**SHORT, **references(1)},
    {**SHORT, **references(2), **GUIDED},
    SHORT,
    {**SHORT, **references(3)},
    SHORT,
)

FLUX_2 = mixed_jobs(
    {**SHORT_CHAT, **references(1, 2)},
    {**SHORT_CHAT, **references(3, 4), "guidance_scale": 1.0},
    {**SHORT_CHAT, **references(5)},
    {**SHORT_CHAT, **references(6)},
    SHORT_CHAT,
)

# The same prompt with other images is not the same for the text encoder.
QWEN_IMAGE_EDIT = mixed_jobs(
    {**references(1), **SAME},
    {**references(2), **SAME, **GUIDED},
    {**references(3), **GUIDED, "prompt": qwen_image.LONG},
    {**references(1), "true_cfg_scale": 2.5, "empty_negative_prompt": True},
    {**references(2)},
)

QWEN_IMAGE_EDIT_PLUS = mixed_jobs(
    {**references(1, 2), **SAME},
    {**references(2, 1), **SAME, **GUIDED},
    {**references(3, 4), "prompt": qwen_image.LONG},
    {**references(3), **GUIDED},
    {**references(4)},
)

CASES = [
    FamilyCase("FLUX.1 Kontext", write_kontext, KONTEXT, kontext_call),
    FamilyCase("FLUX.2 klein base", flux_2.write_klein, FLUX_2, flux_2_call),
    FamilyCase("Qwen-Image-Edit", write_qwen_image_edit, QWEN_IMAGE_EDIT, qwen_image_edit_call),
    FamilyCase(
        "Qwen-Image-Edit-Plus",
        write_qwen_image_edit_plus,
        QWEN_IMAGE_EDIT_PLUS,
        qwen_image_edit_call,
    ),
]
