"""Files of LoRA adapters with random weights, in the layouts of diffusers, kohya and PEFT."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "proj_in",
    "proj_mlp",
    "time_emb_proj",
    "norm1.linear",
)
"""The ends of the names of denoiser layers that adapters change."""

ENCODER_TARGETS = ("q_proj", "v_proj", "fc1")


def random_layers(
    module: nn.Module, targets: tuple[str, ...], rank: int, seed: int, size: float = 0.2
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """``down`` and ``up`` for each layer of ``module`` whose name ends with one of ``targets``."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d) or not name.endswith(targets):
            continue
        outputs, *inputs = layer.weight.shape
        up_shape = (outputs, rank, *(1 for _ in inputs[1:]))
        layers[name] = (
            size * torch.randn(rank, *inputs, generator=generator),
            size * torch.randn(up_shape, generator=generator),
        )
    assert layers
    return layers


def write_adapter(
    file: Path,
    pipeline: Any,
    *,
    rank: int = 4,
    seed: int = 1,
    encoders: bool = True,
    targets: tuple[str, ...] = TARGETS,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """An adapter for the denoiser and the CLIP text encoders of ``pipeline``, in diffusers' layout.

    ``metadata`` is PEFT's configuration, for the denoiser.
    """
    state: dict[str, torch.Tensor] = {}
    for name in type(pipeline)._lora_loadable_modules:
        module = getattr(pipeline, name, None)
        is_encoder = name.startswith("text_encoder")
        if module is None or (is_encoder and not encoders):
            continue
        wanted = ENCODER_TARGETS if is_encoder else targets
        for layer, (down, up) in random_layers(module, wanted, rank, seed).items():
            state[f"{name}.{layer}.lora_A.weight"] = down
            state[f"{name}.{layer}.lora_B.weight"] = up
    header = {"format": "pt"}
    if metadata is not None:
        header["lora_adapter_metadata"] = json.dumps(metadata)
    file.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(state, file, header)
    return file


def write_kohya(file: Path, pipeline: Any) -> None:
    """Names with underscores, and an alpha for each layer that is not its rank."""
    state: dict[str, torch.Tensor] = {}
    for prefix, module, targets in (
        ("lora_unet", pipeline.unet, ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj")),
        ("lora_te_text_model", pipeline.text_encoder, ("q_proj", "v_proj", "out_proj")),
    ):
        for index, (name, (down, up)) in enumerate(random_layers(module, targets, 4, 3).items()):
            key = f"{prefix}_{name.removeprefix('text_model.')}".replace(".", "_")
            state[f"{key}.lora_down.weight"] = down
            state[f"{key}.lora_up.weight"] = up
            # diffusers takes the most common alpha for all layers of attention.
            state[f"{key}.alpha"] = torch.tensor(2.0 if "ff" not in name else 7.0 + index)
    safetensors.torch.save_file(state, file)
