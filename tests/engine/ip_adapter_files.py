"""Tiny IP-Adapters with random weights, in the layout in which real ones are published."""

import math
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from bench.tiny_families.parts import shaken

PROJECTION, HIDDEN = 24, 16
"""The widths of what the image encoder returns, and of its states."""


def write_image_encoder(folder: Path, projection: int = PROJECTION) -> Path:
    """An image encoder for pictures of 32×32 pixels."""
    config = transformers.CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=24,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    shaken(transformers.CLIPVisionModelWithProjection(config)).save_pretrained(folder)
    return folder


def write_ip_adapter(file: Path, unet: Any, *, plus: bool = False) -> Path:
    """An IP-Adapter for ``unet``; with ``plus`` it reads the states of the image encoder."""
    width = unet.config.cross_attention_dim
    generator = torch.Generator().manual_seed(3)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    weights = _plus(width, weight) if plus else _projection(width, weight)
    number, modules = 1, dict(unet.named_modules())
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            rows = modules[name.removesuffix(".processor")].to_q.in_features
            for each in ("to_k_ip", "to_v_ip"):
                weights[f"ip_adapter.{number}.{each}.weight"] = weight(rows, width)
            number += 2
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, file)
    return file


def _projection(width: int, weight: Any) -> dict[str, torch.Tensor]:
    return {
        "image_proj.proj.weight": weight(4 * width, PROJECTION),
        "image_proj.proj.bias": weight(4 * width),
        "image_proj.norm.weight": 1 + weight(width),
        "image_proj.norm.bias": weight(width),
    }


def _plus(width: int, weight: Any) -> dict[str, torch.Tensor]:
    inner = 16
    weights = {
        "latents": weight(1, 4, inner),
        "proj_in.weight": weight(inner, HIDDEN),
        "proj_in.bias": weight(inner),
        "proj_out.weight": weight(width, inner),
        "proj_out.bias": weight(width),
        "norm_out.weight": 1 + weight(width),
        "norm_out.bias": weight(width),
    }
    for layer in range(4):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            weights[f"layers.{layer}.{norm}.weight"] = 1 + weight(inner)
            weights[f"layers.{layer}.{norm}.bias"] = weight(inner)
        # diffusers derives the heads of 64 values from these shapes.
        weights[f"layers.{layer}.0.to_q.weight"] = weight(64, inner)
        weights[f"layers.{layer}.0.to_kv.weight"] = weight(128, inner)
        weights[f"layers.{layer}.0.to_out.weight"] = weight(inner, 64)
        weights[f"layers.{layer}.1.1.weight"] = weight(4 * inner, inner)
        weights[f"layers.{layer}.1.3.weight"] = weight(inner, 4 * inner)
    return {f"image_proj.{name}": each for name, each in weights.items()}
