"""The original layout of a whole Stable Diffusion 3: what diffusers' conversion reads, inverted."""

import re
from typing import Any

import torch

from .original_layout import vae_in_original_layout

EMBEDDERS = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
QKV = {
    "attn.to_q": ("x_block.attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    "attn.add_q_proj": (
        "context_block.attn.qkv",
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ),
}
"""Of the first of three layers: the layer that holds all three, and their names."""


def original_sd3_layout(pipeline: Any) -> dict[str, torch.Tensor]:
    """The weights of a whole pipeline under the names of a single-file checkpoint.

    The projection of its first text encoder must be the identity, which such files do not hold.
    """
    found = {
        f"model.diffusion_model.{key}": weight
        for key, weight in _transformer(pipeline.transformer.state_dict()).items()
    }
    found.update(vae_in_original_layout(pipeline.vae))
    for prefix, part in (
        ("clip_l", "text_encoder"),
        ("clip_g", "text_encoder_2"),
        ("t5xxl", "text_encoder_3"),
    ):
        for key, weight in getattr(pipeline, part).state_dict().items():
            if (part, key) != ("text_encoder", "text_projection.weight"):
                found[f"text_encoders.{prefix}.transformer.{key}"] = weight
    return {key: weight.clone().contiguous() for key, weight in found.items()}


def _transformer(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    last = max(int(key.split(".")[1]) for key in weights if key.startswith("transformer_blocks."))
    found: dict[str, torch.Tensor] = {}
    for key, weight in weights.items():
        match = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)\.(weight|bias)", key)
        if match is None:
            layer, _, kind = key.rpartition(".")
            name = EMBEDDERS.get(key) or f"{EMBEDDERS.get(layer, layer)}.{kind}"
            found[name] = _swapped(weight) if layer == "norm_out.linear" else weight
            continue
        number, layer, kind = int(match[1]), match[2], match[3]
        if layer in QKV:
            name, parts = QKV[layer]
            start = f"transformer_blocks.{number}."
            weight = torch.cat([weights[f"{start}{part}.{kind}"] for part in parts])
        elif layer in BLOCK:
            name = BLOCK[layer]
            if number == last and layer == "norm1_context.linear":
                weight = _swapped(weight)
        else:
            continue  # Keys and values, which are with the queries.
        found[f"joint_blocks.{number}.{name}.{kind}"] = weight
    return found


def _swapped(weight: torch.Tensor) -> torch.Tensor:
    """The scale and the shift of a norm, in the other order."""
    scale, shift = weight.chunk(2)
    return torch.cat([shift, scale])
