"""Copies of the demo model whose pictures differ."""

import os
import shutil
from pathlib import Path

import safetensors.numpy

from darkroom_server.settings.sources import DEMO_MODEL

WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"
LAYER = "conv_out.weight"
"""The layer that is changed: the last one, so that a picture stays one."""


def write_copies(folder: Path, names: list[str]) -> int:
    """Write models of these ``names`` into ``folder``; returns the bytes of one model's weights.

    Those that are there stay. All but the changed file is linked where the file system allows it.
    """
    weights = safetensors.numpy.load_file(DEMO_MODEL / WEIGHTS)
    for number, name in enumerate(names):
        if (folder / name / WEIGHTS).exists():
            continue
        shutil.copytree(DEMO_MODEL, folder / name, copy_function=_link)
        changed = weights[LAYER] * (1.0 + 0.002 * (number + 1))
        (folder / name / WEIGHTS).unlink()
        safetensors.numpy.save_file(
            {**weights, LAYER: changed.astype(weights[LAYER].dtype)},
            folder / name / WEIGHTS,
            {"format": "pt"},
        )
    return sum(file.stat().st_size for file in DEMO_MODEL.rglob("*.safetensors"))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
