"""Trains a ControlNet that fixes position and size of the shape from a mask image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from training.adapters.descent import Descent
from training.denoiser import with_noise
from training.latents import LatentSource
from training.scenes import Placement, Scene
from training.shapes import draw

SIZE_LIMIT = 9_000_000
"""Most bytes for the weights: they ship inside a Python package."""

_EMBEDDING = (16, 32, 64, 64)
_PEAK_RATE = 1e-3
_RADII = (0.14, 0.34)
_MARGIN = 0.02


def random_mask_placement(rng: np.random.Generator, height: int, width: int) -> Placement:
    """Sample a placement anywhere inside a picture of `height` by `width` pixels."""
    short = min(height, width)
    radius = float(rng.uniform(*_RADII))
    # A star reaches 1.1 times its radius.
    edge = 1.1 * radius + _MARGIN
    x, y = (rng.uniform(edge, length / short - edge) for length in (width, height))
    return Placement(float(x), float(y), radius)


def draw_anywhere(
    scenes: Sequence[Scene], rng: np.random.Generator, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Draw scenes at placements that their words do not describe; returns what `draw` returns."""
    placements = [random_mask_placement(rng, height, width) for _ in scenes]
    return draw(scenes, placements, height, width)


def train_controlnet(model: Path, steps: int, seed: int, folder: Path, batch: int = 16) -> float:
    """Train a ControlNet from the UNet's own first half, and write it to `folder` in fp16.

    Returns the minutes of the training. Raises ValueError if the weights are larger than
    `SIZE_LIMIT`.
    """
    torch.manual_seed(seed)
    pipeline: Any = StableDiffusionPipeline.from_pretrained(model)
    unet = pipeline.unet.requires_grad_(False)
    pipeline.text_encoder.requires_grad_(False)
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=_EMBEDDING)
    controlnet.requires_grad_(True).train()
    # Faster on a CPU than the fused attention, whose backward pass is slow there.
    unet.set_attn_processor(AttnProcessor())
    controlnet.set_attn_processor(AttnProcessor())
    source = LatentSource(
        pipeline.vae,
        pipeline.tokenizer,
        seed,
        torch.device("cpu"),
        batch,
        pool_size=16 * batch,
        fresh=batch // 4,
        ease=0.0,
        drawing=draw_anywhere,
    )
    descent = Descent("position", list(controlnet.parameters()), steps, _PEAK_RATE)
    for _ in descent:
        latents, tokens, masks = source.batch()
        noisy, times, target = with_noise(latents, pipeline.scheduler)
        with torch.autocast("cpu", torch.bfloat16):
            words = pipeline.text_encoder(tokens).last_hidden_state
            image = masks.unsqueeze(1).expand(-1, 3, -1, -1)
            down, middle = controlnet(noisy, times, words, image, return_dict=False)
            predicted = unet(
                noisy,
                times,
                words,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
            ).sample
        descent.step((predicted.float() - target).square().mean())
    controlnet.half().save_pretrained(folder)
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if weights > SIZE_LIMIT:
        raise ValueError(f"weights take {weights} bytes, more than {SIZE_LIMIT}")
    return descent.minutes
