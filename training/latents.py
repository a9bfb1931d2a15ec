"""Batches for training: newly drawn scenes, encoded, with their prompts and masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTokenizer

from training.prompts import random_prompt
from training.scenes import Scene, random_scene
from training.shapes import draw_randomly

Drawing = Callable[[Sequence[Scene], np.random.Generator, int, int], tuple[Tensor, Tensor]]
"""Draws scenes at random placements; takes and returns what `draw_randomly` does."""


class Batch(NamedTuple):
    """Scaled latents (n, 4, h/8, w/8), token ids (n, tokens), and masks (n, h, w) in 0..1."""

    latents: Tensor
    tokens: Tensor
    masks: Tensor


_OTHER_SIZES = ((64, 64), (96, 96), (192, 192), (256, 256), (128, 192), (192, 128), (96, 160))
_OTHER_SIZES_EVERY = 10
_ENCODE_AT_ONCE = 32


class LatentSource:
    """Endless batches of encoded pictures.

    Encoding costs a quarter of a training step, so 128×128 scenes are kept in a pool: every batch
    replaces `fresh` of its pictures by new ones and samples the rest from the pool. Each picture is
    used a few times, every time with other noise and another prompt. Every tenth batch has another
    size, and all its pictures are new.

    `ease`, 0..1, is the share of easy scenes and of plain prompts in new samples. `drawing` makes
    the pictures.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        seed: int,
        device: torch.device,
        batch_size: int = 32,
        pool_size: int = 3072,
        fresh: int = 10,
        ease: float = 1.0,
        drawing: Drawing = draw_randomly,
    ) -> None:
        self._vae = vae.to(device).eval()
        self._tokenizer = tokenizer
        self._rng = np.random.default_rng(seed)
        # Every process uses the same sizes at the same step, so none waits for another.
        self._size_rng = np.random.default_rng(0)
        self._device = device
        self._batch_size = batch_size
        self._fresh = fresh
        self.ease = ease
        self._drawing = drawing
        self._oldest = 0
        self._count = 0
        self._scenes: list[Scene] = []
        latents, masks = [], []
        for _ in range(0, pool_size, _ENCODE_AT_ONCE):
            scenes, encoded, drawn = self._draw(_ENCODE_AT_ONCE, 128, 128)
            self._scenes += scenes
            latents.append(encoded)
            masks.append(drawn)
        self._pool, self._masks = torch.cat(latents), torch.cat(masks)

    def batch(self) -> Batch:
        """Return the next batch."""
        self._count += 1
        if self._count % _OTHER_SIZES_EVERY == 0:
            height, width = _OTHER_SIZES[int(self._size_rng.integers(len(_OTHER_SIZES)))]
            count = max(4, min(self._batch_size, self._batch_size * 128 * 128 // (height * width)))
            scenes, latents, masks = self._draw(count, height, width)
        else:
            self._refresh()
            rows = self._rng.integers(len(self._scenes), size=self._batch_size).tolist()
            scenes = [self._scenes[i] for i in rows]
            latents, masks = self._pool[rows], self._masks[rows]
        prompts = [random_prompt(scene, self._rng, self.ease) for scene in scenes]
        return Batch(latents, self._tokens(prompts), masks.float() / 255)

    def _refresh(self) -> None:
        for scene, latent, mask in zip(*self._draw(self._fresh, 128, 128), strict=True):
            self._scenes[self._oldest] = scene
            self._pool[self._oldest] = latent
            self._masks[self._oldest] = mask
            self._oldest = (self._oldest + 1) % len(self._scenes)

    @torch.no_grad()
    def _draw(self, count: int, height: int, width: int) -> tuple[list[Scene], Tensor, Tensor]:
        """Return scenes, their latents, and their masks in 0..255, which take a byte a pixel."""
        scenes = [random_scene(self._rng, self.ease) for _ in range(count)]
        pictures, masks = self._drawing(scenes, self._rng, height, width)
        with torch.autocast(self._device.type, torch.bfloat16):
            latents = self._vae.encode(pictures.to(self._device)).latent_dist.mean
        kept = (masks * 255).round().byte().to(self._device)
        return scenes, latents.float() * self._vae.config.scaling_factor, kept

    def _tokens(self, prompts: list[str]) -> Tensor:
        encoded = self._tokenizer(
            prompts,
            padding="max_length",
            max_length=self._tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        ids: Tensor = encoded.input_ids.to(self._device)
        return ids
