"""Judges a model folder: `python -m training.evaluate FOLDER`.

Generates pictures for 200 prompts whose combination of shape, colour and background was held out of
training, judges them at 20 and at 8 steps, and writes `evaluation.json` and the model card.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from training.export import DEFAULTS
from training.judge import CRISP_OVERLAP, LEAST_OVERLAP, Verdict, judge
from training.model_card import write_model_card
from training.prompts import prompt_for
from training.scenes import POSITIONS, SIZES, Scene, held_out_triples

GOALS = {"background": 0.98, "colour": 0.95, "shape": 0.90}
"""The required share of right pictures, by criterion."""

PROMPTS = 200
STEPS = (int(DEFAULTS["steps"]), 8)
GUIDANCE = DEFAULTS["guidance_scale"]
_SEED = 2024
_BATCH = 20


def held_out_scenes(count: int) -> list[Scene]:
    """Return `count` distinct scenes with held-out combinations, the same ones every time."""
    scenes = [Scene(*t, s, p) for t in held_out_triples() for s in SIZES for p in POSITIONS]
    order = np.random.default_rng(_SEED).permutation(len(scenes))
    return [scenes[i] for i in order[:count]]


def develop(
    pipeline: StableDiffusionPipeline, prompts: list[str], steps: int, guidance: float
) -> Tensor:
    """Run the plain pipeline on prompts, seeded one by one; (n, 3, 128, 128) in 0..255."""
    pictures = []
    for start in range(0, len(prompts), _BATCH):
        chunk = prompts[start : start + _BATCH]
        seeds = [torch.Generator().manual_seed(_SEED + start + i) for i in range(len(chunk))]
        images = pipeline(
            chunk,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=seeds,
            output_type="np",
        ).images
        pictures.append(torch.from_numpy(images).permute(0, 3, 1, 2) * 255)
    return torch.cat(pictures).round()


def summarise(verdicts: list[Verdict]) -> dict[str, float]:
    """Return the share of right pictures by criterion, and the mean overlap."""
    keys = ("background", "colour", "shape", "crisp", "size", "position")
    shares = {key: sum(getattr(v, key) for v in verdicts) / len(verdicts) for key in keys}
    shares["mean_overlap"] = round(sum(v.overlap for v in verdicts) / len(verdicts), 4)
    return shares


def contact_sheet(pictures: Tensor, columns: int = 10) -> Image.Image:
    """Arrange pictures (n, 3, h, w) in 0..255 in a grid."""
    count, _, height, width = pictures.shape
    rows = -(-count // columns)
    sheet = torch.full((rows * columns, 3, height, width), 255.0)
    sheet[:count] = pictures
    grid = sheet.view(rows, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    return Image.fromarray(grid.reshape(rows * height, columns * width, 3).byte().numpy())


def main() -> None:
    """Parse the command line, judge, and write the results into the model folder."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m training.evaluate")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--steps", type=int, nargs="*", default=list(STEPS))
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets")
    parser.add_argument("--no-card", action="store_true", help="print only, write nothing")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    pipeline = StableDiffusionPipeline.from_pretrained(options.folder)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    scenes = held_out_scenes(options.prompts)
    prompts = [prompt_for(scene) for scene in scenes]
    results: dict[str, Any] = {
        "prompts": len(prompts),
        "guidance_scale": options.guidance,
        "recommended_steps": max(options.steps),
        "scheduler": type(pipeline.scheduler).__name__,
        "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
        "least_overlap": LEAST_OVERLAP,
        "crisp_overlap": CRISP_OVERLAP,
        "goals": GOALS,
        "steps": {},
    }
    for steps in options.steps:
        pictures = develop(pipeline, prompts, steps, options.guidance)
        verdicts = [judge(p, s) for p, s in zip(pictures, scenes, strict=True)]
        results["steps"][str(steps)] = summarise(verdicts)
        print(f"{steps} steps: {results['steps'][str(steps)]}", flush=True)
        for prompt, verdict in zip(prompts, verdicts, strict=True):
            if not (verdict.background and verdict.colour and verdict.shape):
                seen = prompt_for(verdict.seen)
                print(f"  wrong: {prompt!r} looks like {seen!r} ({verdict.overlap:.2f})")
        if options.sheets is not None:
            options.sheets.mkdir(parents=True, exist_ok=True)
            contact_sheet(pictures[:80]).save(options.sheets / f"steps-{steps}.png")
    if not options.no_card:
        text = json.dumps(results, indent=2) + "\n"
        (options.folder / "evaluation.json").write_text(text, "utf-8")
        write_model_card(options.folder)


if __name__ == "__main__":
    main()
