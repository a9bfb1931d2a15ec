"""A served image equals the image that diffusers' own pipeline generates from the same folder."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

from darkroom_client import Client

DEMO_MODEL = Path(__file__).parents[2] / "server" / "src" / "darkroom_server" / "demo_model"
PROMPT = "a large yellow star on a blue background"


@pytest.mark.parametrize(("scheduler", "steps", "guidance"), [("ddim", 8, 5.0), ("euler", 12, 1.0)])
def test_a_served_image_equals_the_pipelines(
    address: str, scheduler: str, steps: int, guidance: float
) -> None:
    with Client(address, insecure=True) as client:
        served = client.generate(
            PROMPT, scheduler=scheduler, steps=steps, guidance_scale=guidance, seed=11
        )
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO_MODEL, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    if scheduler == "euler":
        pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    expected = pipeline(
        PROMPT,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator("cpu").manual_seed(11),
    ).images[0]
    difference = served.images[0].to_numpy().astype(int) - np.asarray(expected).astype(int)
    assert np.abs(difference).max() <= 2
