"""Model folders of other kinds than the tiny one: made of it, changed, or broken."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from .tiny import SIZE, write_tiny_model

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


def write_second_generation(folder: Path) -> Path:
    """A tiny model with what Stable Diffusion 2.x brought.

    Linear projections, a list of head counts, v-prediction, and another text encoder, whose last
    layer but one is read: a configuration of one layer less than it was trained with.
    """
    write_tiny_model(folder, prediction_type="v_prediction")
    torch.manual_seed(2)
    UNet2DConditionModel(
        sample_size=SIZE // 8,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=[2, 4],
        use_linear_projection=True,
    ).save_pretrained(folder / "unet")
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    CLIPTextModel(
        CLIPTextConfig(
            **{
                **config,
                "hidden_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 3,
                "hidden_act": "gelu",
            }
        )
    ).save_pretrained(folder / "text_encoder")
    return folder


def edited(folder: Path, target: Path, edit: Callable[[Path], object]) -> Path:
    """A copy of ``folder`` at ``target``, changed by ``edit``."""
    shutil.copytree(folder, target)
    edit(target)
    return target


def edit_index(folder: Path, **entries: Any) -> None:
    """Change entries of the pipeline's index; None takes one out."""
    edit_json(folder / "model_index.json", **entries)


def edit_json(file: Path, **entries: Any) -> None:
    """Change entries of a JSON file; None takes one out."""
    removed = [name for name, value in entries.items() if value is None]
    found = {**json.loads(file.read_text()), **entries}
    file.write_text(json.dumps({k: v for k, v in found.items() if k not in removed}))


def save_elsewhere(folder: Path) -> Path:
    """Let other versions have saved the text encoder and the VAE of ``folder``; returns that."""
    edit_json(
        folder / "text_encoder" / "config.json",
        _name_or_path="somebody/else",
        transformers_version="4.30.2",
        torch_dtype="float16",
        dtype=None,
    )
    edit_json(
        folder / "vae" / "config.json", _name_or_path="somebody/else", _diffusers_version="0.20.0"
    )
    return folder


def truncate(file: Path) -> None:
    """Leave the first half, as a copy does that broke off."""
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def pickle(file: Path) -> None:
    """Put a pickle file in the place of safetensors."""
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


def drop_weight(file: Path, key: str) -> None:
    """Leave one weight out."""
    weights = load_file(file)
    del weights[key]
    save_file(weights, file, metadata={"format": "pt"})


def reshape_weight(file: Path, key: str) -> None:
    """Give one weight another shape."""
    save_file({**load_file(file), key: torch.zeros(3, 3)}, file, metadata={"format": "pt"})


def halve(folder: Path) -> None:
    """Put half-precision files, as variant ``fp16``, in the place of the full ones."""
    for name in (UNET, VAE, TEXT):
        file = folder / name
        weights = {key: weight.half() for key, weight in load_file(file).items()}
        save_file(weights, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        file.unlink()
