"""Writes the model card from `evaluation.json` and `training.json`; no number is typed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training.prompts import PLACES
from training.scenes import COLOURS, SHAPES, held_out_triples, triples

_JUDGED = {
    "background": "background colour right",
    "colour": "object colour right",
    "shape": "shape right",
    "crisp": "shape right and crisp",
    "size": "size right",
    "position": "position right",
}


def write_model_card(folder: Path) -> None:
    """Write `README.md` into a model folder that has been evaluated."""
    evaluation = json.loads((folder / "evaluation.json").read_text("utf-8"))
    training_path = folder / "training.json"
    training = json.loads(training_path.read_text("utf-8")) if training_path.exists() else {}
    weights = sum(p.stat().st_size for p in folder.rglob("*.safetensors")) / 1e6
    (folder / "README.md").write_text(_card(evaluation, training, weights), "utf-8")


def _card(evaluation: dict[str, Any], training: dict[str, Any], weights: float) -> str:
    steps, guidance = evaluation["recommended_steps"], evaluation["guidance_scale"]
    places = ", ".join(f'"{p}"' for p in PLACES.values() if p)
    return f"""---
license: apache-2.0
pipeline_tag: text-to-image
library_name: diffusers
---

# Darkroom demo model

A small text-to-image diffusion model in the folder format of `StableDiffusionPipeline`, so that
a server can show real pictures without a download. It draws one coloured shape on a flat
background. It knows nothing else: it was trained only on scenes drawn by code in `training/`,
and on no photograph, artwork or other person's data.

## Use

```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("demo_model")
prompt = "a large yellow star on a blue background"
image = pipeline(prompt, num_inference_steps={steps}, guidance_scale={guidance}).images[0]
```

* Recommended: {steps} steps, guidance scale {guidance}, {evaluation["scheduler"]}.
* 128×128 pixels by default; 64 to 256, in multiples of 8, give a picture too.
* Weights: fp16, {weights:.1f} MB together.

## Prompts

    [a] [small|large] COLOUR SHAPE [PLACE] on a COLOUR background

* Colours: {", ".join(COLOURS)}.
* Shapes: {", ".join(SHAPES)}.
* Places: {places};
  without one, the shape is near the centre.

Training also met other orders of the same words, prompts that leave parts open, and stray words;
what a prompt leaves open is left to chance. Any other word is read byte by byte and means nothing
to the model. How well such prompts are followed was not measured. Prompts are cut at 32 tokens.

## Evaluation

{evaluation["prompts"]} prompts whose combination of shape, colour and background was held out of
training ({len(held_out_triples())} combinations of {len(triples())}), one fixed seed each, guidance
scale {guidance}, {evaluation["dtype"]}. A shape is right if, of all six, it fits the picture
best, with an intersection over union of at least {evaluation["least_overlap"]}; it is crisp if that
is at least {evaluation["crisp_overlap"]}.

{_table(evaluation)}

{_missed(evaluation)}

These numbers are written by `python -m training.evaluate`.

## Training

{_training(training)}
"""


def _table(evaluation: dict[str, Any]) -> str:
    columns = list(evaluation["steps"])
    lines = [
        "| | goal | " + " | ".join(f"{c} steps" for c in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for key, title in _JUDGED.items():
        goal = evaluation["goals"].get(key)
        aim = f"≥ {goal:.0%}" if goal else ""
        values = " | ".join(f"{evaluation['steps'][c][key]:.1%}" for c in columns)
        lines.append(f"| {title} | {aim} | {values} |")
    overlaps = " | ".join(f"{evaluation['steps'][c]['mean_overlap']:.3f}" for c in columns)
    lines.append(f"| mean intersection over union | | {overlaps} |")
    return "\n".join(lines)


def _missed(evaluation: dict[str, Any]) -> str:
    """List the goals that are not reached."""
    missed = [
        f"{_JUDGED[key]} at {steps} steps ({shares[key]:.1%} of {goal:.0%})"
        for key, goal in evaluation["goals"].items()
        for steps, shares in evaluation["steps"].items()
        if shares[key] < goal
    ]
    return f"Not reached: {', '.join(missed)}." if missed else "All goals are reached."


def _training(training: dict[str, Any]) -> str:
    if not training:
        return "Trained by `python -m training.train`."
    runs = training["denoiser_runs"]
    steps = " and then ".join(f"{run['steps']:.0f}" for run in runs)
    again = "" if len(runs) == 1 else ", each run from the last one's averaged weights"
    minutes = training["vae_minutes"] + sum(run["minutes"] for run in runs)
    return (
        f"`python -m training.train`, seed {training['seed']}:\n"
        f"{training['vae_steps']} batches for the autoencoder, then {steps} batches of\n"
        f"{training['batch']} for the text model and the UNet together{again}\n"
        "(v-prediction, 12 % empty prompts);\n"
        f"{minutes:.0f} minutes on {training['device']} altogether."
    )
