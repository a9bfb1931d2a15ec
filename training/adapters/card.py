"""Writes the adapters' card from what was recorded; no number is typed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training.adapters.verdicts import FOLLOWED, UNCHANGED

_RIGHT = {
    "outline": (
        "the shape is right and an outline: background inside, colour along its edge",
        "without the adapter",
    ),
    "night": (
        "shape and colour are right, the background is black; no prompt says black",
        "without the adapter",
    ),
    "two LoRAs": ("both of the above", "with `outline` only"),
    "ControlNet": (
        f"the shape overlaps the mask by at least {FOLLOWED} (intersection over union), though the"
        " prompt says another place; the colours are right",
        "without the ControlNet",
    ),
    "image to image": (
        f"the shape overlaps the input's by at least {FOLLOWED} (intersection over union)",
        "with strength 1",
    ),
    "inpaint": (
        f"outside the mask the mean difference is at most {UNCHANGED} levels of 255; inside are"
        " the prompt's shape and colour",
        "without the mask",
    ),
}


def write_card(folder: Path) -> None:
    """Write `README.md` into a folder of adapters that were evaluated."""
    evaluation = json.loads((folder / "evaluation.json").read_text("utf-8"))
    training = json.loads((folder / "training.json").read_text("utf-8"))
    (folder / "README.md").write_text(_card(folder, evaluation, training), "utf-8")


def _card(folder: Path, evaluation: dict[str, Any], training: dict[str, Any]) -> str:
    loras = ", ".join(
        f"`{file.stem}` ({file.stat().st_size / 1e3:.0f} kB)"
        for file in sorted((folder / "loras").glob("*.safetensors"))
    )
    position = folder / "controlnets" / "position" / "diffusion_pytorch_model.safetensors"
    megabytes = position.stat().st_size / 1e6
    runs = "\n".join(
        f"* {name}: {run['steps']} batches, seed {run['seed']}, {run['minutes']} minutes on"
        f" {run['threads']} CPU thread{'s' if run['threads'] > 1 else ''}."
        for name, run in training.items()
    )
    rows = "\n".join(
        f"| {kind} | {_RIGHT[kind][0]} | {shares['right']:.0%} | {_RIGHT[kind][1]}:"
        f" {shares['controls']:.0%} |"
        for kind, shares in evaluation["kinds"].items()
    )
    return f"""---
license: apache-2.0
library_name: diffusers
---

# Adapters of the Darkroom demo model

LoRA adapters in diffusers' layout, fp16: {loras}.
`outline` turns each shape into its outline, but not rings and small ones; `night` makes the
background black.

The ControlNet `position` ({megabytes:.1f} MB, fp16) fixes position and size of the shape: its image
shows the shape in white on black.

A server with the demo model offers all three by these names. They were trained only on scenes that
the code in `training/` makes.

## Evaluation

{evaluation["prompts"]} prompts each, whose combination of shape, colour and background was held out
of training, {evaluation["steps"]} steps, all kinds at once through one server. Every prompt has a
control with the same seed, which lacks what the row is about; its picture should not be right.

| | a picture is right if | right | control |
|---|---|---|---|
{rows}

These numbers are written by `python -m training.adapters.evaluate`.

## Training

`python -m training.adapters.train`; other work on the machine counts in its minutes:

{runs}
"""
