"""Writes the trained parts as a `StableDiffusionPipeline` folder."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTokenizer

from training.denoiser import Denoiser, new_scheduler

_M = TypeVar("_M", bound=torch.nn.Module)

SIZE_LIMIT = 24_000_000
"""Most bytes for all weights: the model ships inside a Python package."""

DEFAULTS = {"steps": 20, "guidance_scale": 2.0}
"""The server's defaults for this model.

Twice the guidance bends the sides of squares and frays points, so fewer shapes are crisp: see
`python -m training.evaluate FOLDER --guidance 4 --no-card`.
"""


def export_pipeline(
    folder: Path, tokenizer: CLIPTokenizer, denoiser: Denoiser, vae: AutoencoderKL
) -> None:
    """Write a pipeline with fp16 weights into `folder`, replacing files one rename at a time.

    Raises ValueError if the weights are larger than `SIZE_LIMIT`.
    """
    pipeline = StableDiffusionPipeline(
        vae=_half(vae),
        text_encoder=_half(denoiser.text_encoder),
        tokenizer=tokenizer,
        unet=_half(denoiser.unet),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as name:
        fresh = Path(name)
        pipeline.save_pretrained(fresh, safe_serialization=True)
        # transformers loads the text model in the dtype of its configuration, diffusers the rest in
        # float32. Half precision on disk must not become half precision on a CPU.
        config_path = fresh / "text_encoder" / "config.json"
        config = json.loads(config_path.read_text("utf-8")) | {"dtype": "float32"}
        config_path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        # Remove the local path that the autoencoder was read from.
        config_path = fresh / "vae" / "config.json"
        config = json.loads(config_path.read_text("utf-8"))
        config.pop("_name_or_path", None)
        config_path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        # The slow tokenizer's two files, for libraries that do not read tokenizer.json.
        for part in ("vocab.json", "merges.txt"):
            shutil.copyfile(Path(tokenizer.name_or_path) / part, fresh / "tokenizer" / part)
        text = json.dumps(DEFAULTS, indent=2) + "\n"
        (fresh / "darkroom.json").write_text(text, "utf-8")
        weights = sum(p.stat().st_size for p in fresh.rglob("*.safetensors"))
        if weights > SIZE_LIMIT:
            raise ValueError(f"weights take {weights} bytes, more than {SIZE_LIMIT}")
        for path in sorted(p for p in fresh.rglob("*") if p.is_file()):
            target = folder / path.relative_to(fresh)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.chmod(0o644)
            os.replace(path, target)


def _half(module: _M) -> _M:
    half = copy.deepcopy(module).cpu().half()
    # Safetensors does not support channels-last weights.
    for parameter in half.parameters():
        parameter.data = parameter.data.contiguous()
    return half
