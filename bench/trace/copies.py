"""Copies of the demo model whose pictures differ."""

import os
import shutil
from pathlib import Path

import safetensors.numpy

from darkroom_server.core.engine_config import EngineConfig
from darkroom_server.engine.families.stable_diffusion import StableDiffusion
from darkroom_server.engine.warmup.presets import resolve
from darkroom_server.settings.sources import DEMO_MODEL

WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"
LAYER = "conv_out.weight"
"""The layer that is changed: the last one, so that a picture stays one."""


def write_copies(folder: Path, names: list[str]) -> int:
    """Write models of these ``names`` into ``folder``; returns the bytes of one model in memory.

    Those depend on the data type that the engine chooses on this machine. Models that are there
    stay. All but the changed file is linked where the file system allows it.
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
    itemsize = resolve(EngineConfig(models=()), StableDiffusion.half).dtype.itemsize
    files = map(safetensors.numpy.load_file, DEMO_MODEL.rglob("*.safetensors"))
    return sum(weight.size for file in files for weight in file.values()) * itemsize


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
