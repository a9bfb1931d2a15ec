"""Tiny models that inpaint only, whose UNet takes nine channels."""

from functools import partial
from pathlib import Path
from typing import Any

import diffusers

from bench.tiny_families.case import FamilyCase
from bench.tiny_families.parts import shaken
from bench.tiny_families.stable_diffusion_xl import BASE, call, write_sdxl

from ..tiny import write_tiny_model
from .image_tasks import STABLE_DIFFUSION, image_call, mask, picture


def nine_channels(folder: Path, pipeline_class: Any, **options: Any) -> Path:
    """Give the model in ``folder`` a UNet of nine channels, and save it as ``pipeline_class``."""
    text: Any = diffusers.DiffusionPipeline.from_pretrained(folder, **options)
    config = {**text.unet.config, "in_channels": 9}
    unet = shaken(diffusers.UNet2DConditionModel.from_config(config))
    pipeline_class.from_pipe(text, unet=unet, torch_dtype=None).save_pretrained(folder)
    return folder


def write_sd(folder: Path) -> Path:
    """A Stable Diffusion that inpaints."""
    nine = diffusers.StableDiffusionInpaintPipeline
    return nine_channels(write_tiny_model(folder), nine, safety_checker=None)


def write_xl(folder: Path) -> Path:
    """A Stable Diffusion XL that inpaints."""
    return nine_channels(write_sdxl(folder), diffusers.StableDiffusionXLInpaintPipeline)


def jobs(fields: Any) -> list[dict[str, Any]]:
    """``fields`` of jobs, each with an image and a mask."""
    return [
        {**each, "image": picture(i), "mask_image": mask(16 + 8 * i), "strength": strength}
        for i, (each, strength) in enumerate(zip(fields, (1.0, 0.7, 1.0, 0.6, 0.9), strict=True))
    ]


CASES = [
    FamilyCase(
        "Stable Diffusion, nine channels",
        write_sd,
        jobs(STABLE_DIFFUSION.jobs),
        partial(image_call, STABLE_DIFFUSION.call),
        load=STABLE_DIFFUSION.load,
    ),
    FamilyCase("SDXL, nine channels", write_xl, jobs(BASE), partial(image_call, call)),
]
