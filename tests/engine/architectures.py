"""The real architectures of SDXL and FLUX.1 dev, from their published configurations."""

from typing import Any

import diffusers
import torch

from bench.cards.modules import (
    clip_big_g,
    clip_l,
    flux_transformer,
    flux_vae,
    sdxl_unet,
    sdxl_vae,
    t5_xxl,
)

__all__ = [
    "clip_big_g",
    "clip_l",
    "flux_scheduler",
    "flux_transformer",
    "flux_vae",
    "on_meta",
    "sdxl_scheduler",
    "sdxl_unet",
    "sdxl_vae",
    "t5_xxl",
]


def sdxl_scheduler() -> Any:
    """The scheduler of SDXL."""
    return diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )


def flux_scheduler() -> Any:
    """The scheduler of FLUX.1 dev."""
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def on_meta(make: Any) -> Any:
    """What ``make`` makes, in bfloat16 and without memory."""
    with torch.device("meta"):
        return make().to(torch.bfloat16).eval().requires_grad_(False)
