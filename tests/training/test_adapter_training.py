from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline

from training.adapters.control import SIZE_LIMIT, train_controlnet
from training.adapters.lora import train_lora
from training.adapters.styles import STYLES

MODEL = Path(__file__).parents[2] / "server" / "src" / "darkroom_server" / "demo_model"
PROMPT = "a red star on a blue background"


@pytest.fixture(scope="module")
def pipeline() -> Any:
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents(pipeline: Any, **inputs: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    options = {"num_inference_steps": 1, "generator": generator, "output_type": "latent"}
    found: torch.Tensor = pipeline(PROMPT, **options, **inputs).images
    return found


def test_a_trained_lora_is_loaded_by_diffusers(pipeline: Any, tmp_path: Path) -> None:
    plain = latents(pipeline)
    train_lora("outline", MODEL, STYLES["outline"], 2, 0, tmp_path, batch=4)
    pipeline.load_lora_weights(tmp_path, weight_name="outline.safetensors")
    try:
        assert not torch.equal(latents(pipeline), plain)
    finally:
        pipeline.unload_lora_weights()
    assert torch.equal(latents(pipeline), plain)


def test_a_trained_controlnet_is_loaded_by_diffusers(tmp_path: Path) -> None:
    train_controlnet(MODEL, 2, 0, tmp_path, batch=4)
    controlnet = ControlNetModel.from_pretrained(tmp_path)
    zero_convolutions = [layer.weight.abs().max() for layer in controlnet.controlnet_down_blocks]
    assert all(weight > 0 for weight in zero_convolutions)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").stat().st_size <= SIZE_LIMIT
