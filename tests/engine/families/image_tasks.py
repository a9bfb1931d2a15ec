"""The families that start from images, and jobs of each task that share batches."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
from PIL import Image

from bench.tiny_families import (
    chroma,
    flux,
    qwen_image,
    stable_diffusion_3,
    stable_diffusion_xl,
    z_image,
)
from bench.tiny_families.case import FamilyCase, mixed_jobs
from darkroom_server.core.inputs import InputImage
from darkroom_server.core.job import Job, Task

from ..tiny import write_tiny_model

PIPELINES = {
    "StableDiffusionPipeline": ("StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    "StableDiffusionXLPipeline": (
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
    ),
    "StableDiffusion3Pipeline": (
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
    ),
    "FluxPipeline": ("FluxImg2ImgPipeline", "FluxInpaintPipeline"),
    "ChromaPipeline": ("ChromaImg2ImgPipeline",),
    "QwenImagePipeline": ("QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
    "ZImagePipeline": ("ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
}
"""diffusers' classes for image to image and inpainting, by that for text."""


def picture(seed: int, size: int = 64) -> InputImage:
    """A picture of random coloured squares."""
    colours = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    pixels = colours.repeat(size // 8, 0).repeat(size // 8, 1)
    return InputImage(
        digest=f"sha256:{seed}", width=size, height=size, channels=3, pixels=pixels.tobytes()
    )


def mask(left: int, size: int = 64) -> InputImage:
    """White from column ``left`` on, black before."""
    pixels = np.zeros((size, size), np.uint8)
    pixels[:, left:] = 255
    return InputImage(
        digest=f"sha256:mask{left}", width=size, height=size, channels=1, pixels=pixels.tobytes()
    )


def inputs(size: int = 64) -> tuple[Mapping[str, Any], ...]:
    """Fields of five jobs: one from text, two image to image, two inpaint."""
    return (
        {"image": picture(1, size), "strength": 0.6},
        {"image": picture(2, size), "mask_image": mask(size // 2, size), "strength": 1.0},
        {"steps": 9},
        {"image": picture(3, size), "strength": 0.6},
        {"image": picture(4, size), "mask_image": mask(size // 4, size), "strength": 0.7},
    )


def with_inputs(jobs: Sequence[Mapping[str, Any]], size: int = 64) -> list[dict[str, Any]]:
    """The fields of ``jobs``, and those of input images."""
    return [{**job, **extra} for job, extra in zip(jobs, inputs(size), strict=True)]


def image_call(call: Callable[[Job], Mapping[str, Any]], job: Job) -> dict[str, Any]:
    """The arguments with which a user of diffusers asks for ``job``, which brings images."""
    arguments = dict(call(job))
    if job.image is not None:
        size = (job.image.width, job.image.height)
        arguments |= {
            "image": Image.frombytes("RGB", size, job.image.pixels),
            "strength": job.strength,
        }
    if job.mask_image is not None:
        size = (job.mask_image.width, job.mask_image.height)
        arguments["mask_image"] = Image.frombytes("L", size, job.mask_image.pixels)
    return arguments


def pipelines_of(text_pipeline: Any) -> dict[Task, Any]:
    """``text_pipeline``, and diffusers' pipelines of the other tasks with its components."""
    if "Inpaint" in type(text_pipeline).__name__:
        return {Task.INPAINT: text_pipeline}
    names = PIPELINES[type(text_pipeline).__name__]
    tasks = (Task.IMAGE_TO_IMAGE, Task.INPAINT)[: len(names)]
    # Without a dtype, from_pipe would convert the weights to float32.
    return {Task.TEXT_TO_IMAGE: text_pipeline} | {
        task: getattr(diffusers, name).from_pipe(text_pipeline, torch_dtype=None)
        for task, name in zip(tasks, names, strict=True)
    }


def sd_call(job: Job) -> dict[str, Any]:
    """The arguments with which a user of diffusers asks Stable Diffusion for ``job``."""
    return {
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "guidance_scale": job.guidance_scale,
    }


def _case(case: FamilyCase, *, inpaints: bool = True, **changes: Any) -> FamilyCase:
    jobs = with_inputs(
        [{k: v for k, v in job.items() if k not in ("width", "height")} for job in case.jobs]
    )
    if not inpaints:
        # From strength 1, an image to image job of flow matching is noise alone.
        jobs = [
            {**{k: v for k, v in job.items() if k != "mask_image"}, "strength": 0.8}
            if "mask_image" in job
            else job
            for job in jobs
        ]
    return replace(case, jobs=jobs, call=partial(image_call, case.call), **changes)


STABLE_DIFFUSION = FamilyCase(
    "Stable Diffusion",
    write_tiny_model,
    mixed_jobs({}, {"negative_prompt": "blue"}, {}, {"guidance_scale": 1.0}, {}),
    sd_call,
    load={"safety_checker": None},
)


def write_sd3_16(folder: Path) -> Path:
    """A Stable Diffusion 3 whose latents have 16 channels, without which it does not inpaint."""
    return stable_diffusion_3.write_sd3(folder, channels=16)


CASES = [
    _case(STABLE_DIFFUSION),
    _case(stable_diffusion_xl.CASES[0]),
    _case(stable_diffusion_3.CASES[0], write=write_sd3_16),
    _case(flux.CASES[0]),
    _case(chroma.CASES[0], inpaints=False),
    _case(qwen_image.CASES[0]),
    _case(z_image.CASES[0]),
]
