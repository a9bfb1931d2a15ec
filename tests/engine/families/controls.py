"""The families that take ControlNets: random nets, diffusers' pipelines, and jobs that mix them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers

from bench.tiny_families import flux, stable_diffusion_3
from bench.tiny_families.case import FamilyCase, mixed_jobs
from bench.tiny_families.parts import shaken
from bench.tiny_families.stable_diffusion_xl import CASES as STABLE_DIFFUSION_XL
from darkroom_server.core.inputs import Control
from darkroom_server.core.job import Task

from ..tiny import write_tiny_model
from . import inpainting
from .image_tasks import mask, picture, sd_call


@dataclass(frozen=True, slots=True)
class ControlCase:
    """A family with the ControlNets that each of ``nets`` makes for its denoiser, by id.

    ``pipelines`` are diffusers' classes by task, each with its argument for the control image.
    ``keeps_noise``: the nets' images take no noise from the sample's generator.
    """

    family: FamilyCase
    nets: Mapping[str, Callable[[Any], Any]]
    pipelines: Mapping[Task, tuple[str, str]]
    keeps_noise: bool = True

    @property
    def name(self) -> str:
        """The family's."""
        return self.family.name

    def write_nets(self, folder: Path, denoiser: Any) -> dict[str, Path]:
        """The folders of the nets."""
        for seed, (id, make) in enumerate(self.nets.items()):
            shaken(make(denoiser), seed=seed + 1).save_pretrained(folder / id)
        return {id: folder / id for id in self.nets}


def unet_net(unet: Any) -> Any:
    """A ControlNet for ``unet``, which may take a mask in further channels."""
    plain = diffusers.UNet2DConditionModel.from_config({**unet.config, "in_channels": 4})
    return diffusers.ControlNetModel.from_unet(
        plain, conditioning_embedding_out_channels=(8, 16, 32, 64)
    )


def sd3_net(layers: int, **config: Any) -> Callable[[Any], Any]:
    """Makes a ControlNet of ``layers`` layers for a Stable Diffusion 3."""
    taken = (
        "sample_size",
        "patch_size",
        "in_channels",
        "out_channels",
        "attention_head_dim",
        "num_attention_heads",
        "joint_attention_dim",
        "caption_projection_dim",
        "pooled_projection_dim",
        "pos_embed_max_size",
    )

    def make(transformer: Any) -> Any:
        given = {name: transformer.config[name] for name in taken}
        return diffusers.SD3ControlNetModel(**given, num_layers=layers, **config)

    return make


def flux_net(**config: Any) -> Callable[[Any], Any]:
    """Makes a ControlNet for a FLUX.1."""
    taken = (
        "in_channels",
        "attention_head_dim",
        "num_attention_heads",
        "joint_attention_dim",
        "pooled_projection_dim",
        "axes_dims_rope",
    )

    def make(transformer: Any) -> Any:
        given = {name: transformer.config[name] for name in taken}
        return diffusers.FluxControlNetModel(**given, **config)

    return make


def write_deep_flux(folder: Path) -> Path:
    """A FLUX.1 dev with more layers than its ControlNets."""
    flux.write_dev(folder)
    config = diffusers.FluxTransformer2DModel.load_config(folder / "transformer")
    config |= {"num_layers": 3, "num_single_layers": 3}
    transformer = diffusers.FluxTransformer2DModel.from_config(config)
    shaken(transformer).save_pretrained(folder / "transformer")
    return folder


def write_deep_sd3(folder: Path) -> Path:
    """A Stable Diffusion 3 with more layers than its ControlNets."""
    stable_diffusion_3.write_sd3(folder)
    config = diffusers.SD3Transformer2DModel.load_config(folder / "transformer")
    transformer = diffusers.SD3Transformer2DModel.from_config({**config, "num_layers": 4})
    shaken(transformer).save_pretrained(folder / "transformer")
    return folder


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


OTHER_LAYOUT: tuple[Mapping[str, Any], ...] = (
    *({} for _ in range(4)),
    {"controls": (Control(id="c", image=picture(15), scale=0.5),)},
)
"""The last job asks for a net with fewer residuals than the others."""

SHORT = {"max_sequence_length": 32}

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
        {"a": unet_net, "b": unet_net},
        {
            Task.TEXT_TO_IMAGE: ("StableDiffusionControlNetPipeline", "image"),
            Task.IMAGE_TO_IMAGE: ("StableDiffusionControlNetImg2ImgPipeline", "control_image"),
            Task.INPAINT: ("StableDiffusionControlNetInpaintPipeline", "control_image"),
        },
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
        {"a": unet_net, "b": unet_net},
        {
            Task.TEXT_TO_IMAGE: ("StableDiffusionXLControlNetPipeline", "image"),
            Task.IMAGE_TO_IMAGE: ("StableDiffusionXLControlNetImg2ImgPipeline", "control_image"),
            Task.INPAINT: ("StableDiffusionXLControlNetInpaintPipeline", "control_image"),
        },
    ),
    ControlCase(
        FamilyCase(
            "nine channels",
            inpainting.write_sd,
            with_controls(
                mixed_jobs({}, {}, {}, {"guidance_scale": 1.0}, {}),
                [
                    {"image": picture(i), "mask_image": mask(16 + 8 * i), "strength": 0.9}
                    for i in range(5)
                ],
            ),
            sd_call,
            load={"safety_checker": None},
        ),
        {"a": unet_net, "b": unet_net},
        {Task.INPAINT: ("StableDiffusionControlNetInpaintPipeline", "control_image")},
    ),
    ControlCase(
        FamilyCase(
            "Stable Diffusion 3",
            write_deep_sd3,
            with_controls(
                mixed_jobs(SHORT, SHORT, SHORT, {**SHORT, "guidance_scale": 1.0}, SHORT),
                OTHER_LAYOUT,
            ),
            stable_diffusion_3.call,
        ),
        {
            "a": sd3_net(2, force_zeros_for_pooled_projection=False),
            "b": sd3_net(2, force_zeros_for_pooled_projection=False),
            "c": sd3_net(1),
        },
        {Task.TEXT_TO_IMAGE: ("StableDiffusion3ControlNetPipeline", "control_image")},
    ),
    ControlCase(
        FamilyCase(
            "FLUX.1 dev",
            write_deep_flux,
            with_controls(
                mixed_jobs(
                    {**SHORT, "true_cfg_scale": 3.0, "negative_prompt": "blue"},
                    SHORT,
                    SHORT,
                    SHORT,
                    SHORT,
                ),
                OTHER_LAYOUT,
                (*INPUTS[:4], {}),
            ),
            lambda job: {
                name: value
                for name, value in flux.call(job).items()
                if job.image is None or not name.startswith(("negative", "true"))
            },
        ),
        {
            "a": flux_net(num_layers=2, num_single_layers=1, guidance_embeds=True),
            "b": flux_net(num_layers=2, num_single_layers=1, guidance_embeds=True),
            "c": flux_net(
                num_layers=2, num_single_layers=0, patch_size=2, conditioning_embedding_channels=4
            ),
        },
        {
            Task.TEXT_TO_IMAGE: ("FluxControlNetPipeline", "control_image"),
            Task.IMAGE_TO_IMAGE: ("FluxControlNetImg2ImgPipeline", "control_image"),
        },
        keeps_noise=False,
    ),
]
