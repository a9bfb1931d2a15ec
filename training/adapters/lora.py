"""Trains a LoRA adapter for some layers of the demo model's UNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from training.adapters.descent import Descent
from training.denoiser import with_noise
from training.latents import Drawing, LatentSource

SIZE_LIMIT = 1_000_000
"""Most bytes for all adapters: they ship inside a Python package."""

ATTENTION = r".*\.(to_q|to_k|to_v|to_out\.0)"
"""Attention determines what is where."""

FINE_CONVOLUTIONS = (
    r"(down_blocks\.0|up_blocks\.[12])\.resnets\..*\.conv[12]"
    r"|up_blocks\.2\.resnets\..*\.conv_shortcut|conv_out"
)
"""The convolutions at the two highest resolutions, for lines finer than any trained shape has."""

LAYERS = {"outline": f"{ATTENTION}|{FINE_CONVOLUTIONS}", "night": ATTENTION}
RANKS = {"outline": 10, "night": 8}
_PEAK_RATE = 5e-3


def train_lora(
    name: str, model: Path, drawing: Drawing, steps: int, seed: int, folder: Path, batch: int = 16
) -> float:
    """Train an adapter on pictures of `drawing` and write it to `folder`/`name`.safetensors.

    The file is fp16, in diffusers' layout. Returns the minutes of the training.
    """
    torch.manual_seed(seed)
    pipeline: Any = StableDiffusionPipeline.from_pretrained(model)
    unet = pipeline.unet.requires_grad_(False)
    # Faster on a CPU than the fused attention, whose backward pass is slow there.
    unet.set_attn_processor(AttnProcessor())
    unet.add_adapter(LoraConfig(r=RANKS[name], lora_alpha=RANKS[name], target_modules=LAYERS[name]))
    pipeline.text_encoder.requires_grad_(False)
    source = LatentSource(
        pipeline.vae,
        pipeline.tokenizer,
        seed,
        torch.device("cpu"),
        batch,
        pool_size=16 * batch,
        fresh=batch // 4,
        ease=0.0,
        drawing=drawing,
    )
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    descent = Descent(name, trained, steps, _PEAK_RATE)
    for _ in descent:
        latents, tokens, _ = source.batch()
        noisy, times, target = with_noise(latents, pipeline.scheduler, evenly=True)
        with torch.autocast("cpu", torch.bfloat16):
            words = pipeline.text_encoder(tokens).last_hidden_state
            predicted = unet(noisy, times, words).sample
        descent.step((predicted.float() - target).square().mean())
    # In PEFT's names: diffusers' older ones exist for attention only, and a file must not mix them.
    layers = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers={key: value.half() for key, value in layers.items()},
        weight_name=f"{name}.safetensors",
    )
    (folder / f"{name}.safetensors").chmod(0o644)
    return descent.minutes
