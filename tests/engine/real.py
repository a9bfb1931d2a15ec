"""Stable Diffusion 1.4's architecture with random weights, in the real folder format."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from training.tokenizer import write_tokenizer

FOLDER = Path(
    os.environ.get("DARKROOM_TEST_SD14", Path(tempfile.gettempdir()) / "darkroom-test-sd14")
)
"""The folder is kept between runs: 2.1 GB."""

SEED = 14


def write_real_model() -> Path:
    """The folder, written the first time; sizes are those of CompVis/stable-diffusion-v1-4."""
    if (FOLDER / "model_index.json").is_file():
        return FOLDER
    # In another folder at first: a killed run must not leave an incomplete one.
    part = FOLDER.with_name(FOLDER.name + ".part")
    tokenizer = write_tokenizer(part / "tokenizer")
    tokenizer.model_max_length = 77
    text_config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    StableDiffusionPipeline(
        unet=filled(
            lambda: UNet2DConditionModel(
                sample_size=64,
                cross_attention_dim=768,
                attention_head_dim=8,
            )
        ),
        vae=filled(
            lambda: AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                sample_size=512,
            )
        ),
        text_encoder=filled(lambda: CLIPTextModel(text_config)),
        tokenizer=tokenizer,
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(part)
    return part.rename(FOLDER)


def filled(make: Callable[[], Any]) -> Any:
    """A model in bfloat16 with small random weights; torch's own initialization takes minutes."""
    with torch.device("meta"):
        model = make()
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.fill_(float(name.endswith("weight")))
            elif name.endswith("bias"):
                weight.zero_()
            else:
                weight.uniform_(-0.02, 0.02, generator=generator)
    # Buffers were made without memory too, and must be filled.
    for module in model.modules():
        if hasattr(module, "position_ids"):
            module.position_ids.copy_(torch.arange(module.position_ids.shape[-1])[None])
    return model
