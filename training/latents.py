"""Batches for the denoiser: newly drawn scenes, encoded, with their prompts."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTokenizer

from training.prompts import random_prompt
from training.scenes import Scene, random_scene
from training.shapes import draw_randomly

_OTHER_SIZES = ((64, 64), (96, 96), (192, 192), (256, 256), (128, 192), (192, 128), (96, 160))
_OTHER_SIZES_EVERY = 10
_ENCODE_AT_ONCE = 32


class LatentSource:
    """Endless batches of latents and tokens.

    Encoding costs a quarter of a training step, so 128×128 scenes are kept in a pool: every batch
    replaces `fresh` of its pictures by new ones and samples the rest from the pool. Each picture is
    used a few times, every time with other noise and another prompt. Every tenth batch has another
    size, and all its pictures are new.

    `ease`, 0..1, is the share of easy scenes and of plain prompts in new samples.
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
        self._oldest = 0
        self._count = 0
        self._scenes: list[Scene] = []
        latents = []
        for _ in range(0, pool_size, _ENCODE_AT_ONCE):
            scenes, encoded = self._draw(_ENCODE_AT_ONCE, 128, 128)
            self._scenes += scenes
            latents.append(encoded)
        self._pool = torch.cat(latents)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return the next batch: scaled latents (n, 4, h, w) and token ids (n, tokens)."""
        self._count += 1
        if self._count % _OTHER_SIZES_EVERY == 0:
            height, width = _OTHER_SIZES[int(self._size_rng.integers(len(_OTHER_SIZES)))]
            count = max(4, min(self._batch_size, self._batch_size * 128 * 128 // (height * width)))
            scenes, latents = self._draw(count, height, width)
        else:
            self._refresh()
            rows = self._rng.integers(len(self._scenes), size=self._batch_size)
            scenes, latents = [self._scenes[i] for i in rows], self._pool[rows.tolist()]
        prompts = [random_prompt(scene, self._rng, self.ease) for scene in scenes]
        return latents, self._tokens(prompts)

    def _refresh(self) -> None:
        scenes, latents = self._draw(self._fresh, 128, 128)
        for scene, latent in zip(scenes, latents, strict=True):
            self._scenes[self._oldest] = scene
            self._pool[self._oldest] = latent
            self._oldest = (self._oldest + 1) % len(self._scenes)

    @torch.no_grad()
    def _draw(self, count: int, height: int, width: int) -> tuple[list[Scene], Tensor]:
        scenes = [random_scene(self._rng, self.ease) for _ in range(count)]
        pictures, _ = draw_randomly(scenes, self._rng, height, width)
        with torch.autocast(self._device.type, torch.bfloat16):
            latents = self._vae.encode(pictures.to(self._device)).latent_dist.mean
        return scenes, latents.float() * self._vae.config.scaling_factor

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
