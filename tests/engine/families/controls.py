"""The families that take ControlNets: random nets, diffusers' pipelines, and jobs that mix them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers

from darkroom_server.core.inputs import Control
from darkroom_server.core.job import Task

from ..tiny import write_tiny_model
from .case import FamilyCase, mixed_jobs
from .image_tasks import mask, picture, sd_call
from .parts import shaken
from .stable_diffusion_xl import CASES as STABLE_DIFFUSION_XL


@dataclass(frozen=True, slots=True)
class ControlCase:
    """A family with two ControlNets, ``a`` and ``b``, that ``net`` makes for its denoiser.

    ``pipelines`` are diffusers' classes by task. ``image`` is the argument for the control image
    in each of them.
    """

    family: FamilyCase
    net: Callable[[Any], Any]
    pipelines: Mapping[Task, str]
    images: Mapping[Task, str]

    @property
    def name(self) -> str:
        """The family's."""
        return self.family.name

    def write_nets(self, folder: Path, denoiser: Any) -> dict[str, Path]:
        """The folders of the nets."""
        for seed, id in enumerate("ab"):
            shaken(self.net(denoiser), seed=seed + 1).save_pretrained(folder / id)
        return {id: folder / id for id in "ab"}


def unet_net(unet: Any, **config: Any) -> Any:
    """A ControlNet for ``unet``."""
    return diffusers.ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=(8, 16, 32, 64), **config
    )


A = Control(id="a", image=picture(11))
MIXES: tuple[Mapping[str, Any], ...] = (
    {"controls": (Control(id="a", image=picture(11), scale=0.8),)},
    {},
    {
        "controls": (
            Control(id="b", image=picture(12), scale=0.3),
            Control(id="a", image=picture(13), scale=1.2, start=0.3),
        )
    },
    {"controls": (Control(id="b", image=picture(14), end=0.5),)},
    {"controls": (Control(id="a", image=picture(15), scale=0.5),)},
)
"""The controls of a case's jobs: one, none, two, one that ends, one with another image."""

INPUTS: tuple[Mapping[str, Any], ...] = (
    {},
    {},
    {},
    {"image": picture(1), "strength": 0.6},
    {"image": picture(2), "mask_image": mask(32), "strength": 0.8},
)


def with_controls(jobs: Any, *further: Any) -> list[dict[str, Any]]:
    """The fields of ``jobs``, with those of ``MIXES`` and ``further``."""
    merged: list[dict[str, Any]] = []
    for fields in zip(jobs, MIXES, *further, strict=True):
        each: dict[str, Any] = {}
        for given in fields:
            each |= given
        merged.append({k: v for k, v in each.items() if k not in ("width", "height")})
    return merged


UNET_IMAGES = {
    Task.TEXT_TO_IMAGE: "image",
    Task.IMAGE_TO_IMAGE: "control_image",
    Task.INPAINT: "control_image",
}

CASES = [
    ControlCase(
        FamilyCase(
            "Stable Diffusion",
            write_tiny_model,
            with_controls(
                mixed_jobs({}, {"negative_prompt": "blue"}, {}, {"guidance_scale": 1.0}, {}), INPUTS
            ),
            sd_call,
            load={"safety_checker": None},
        ),
        unet_net,
        {
            Task.TEXT_TO_IMAGE: "StableDiffusionControlNetPipeline",
            Task.IMAGE_TO_IMAGE: "StableDiffusionControlNetImg2ImgPipeline",
            Task.INPAINT: "StableDiffusionControlNetInpaintPipeline",
        },
        UNET_IMAGES,
    ),
    ControlCase(
        FamilyCase(
            "SDXL",
            STABLE_DIFFUSION_XL[0].write,
            with_controls(mixed_jobs({}, {}, {"prompt_2": "a small heart"}, {}, {}), INPUTS),
            lambda job: {
                "prompt": job.prompt,
                "prompt_2": job.prompt_2 or None,
                "guidance_scale": job.guidance_scale,
            },
        ),
        unet_net,
        {
            Task.TEXT_TO_IMAGE: "StableDiffusionXLControlNetPipeline",
            Task.IMAGE_TO_IMAGE: "StableDiffusionXLControlNetImg2ImgPipeline",
            Task.INPAINT: "StableDiffusionXLControlNetInpaintPipeline",
        },
        UNET_IMAGES,
    ),
]
