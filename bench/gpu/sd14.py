"""Stable Diffusion 1.4's architecture with random weights, in the real folder format.

Time and memory do not depend on the values of the weights, and random ones need no download: 860
million parameters of UNet, CLIP-L's text model, the VAE of Stable Diffusion.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.tokenizer import write_tokenizer

CPU = torch.device("cpu")
TOKENS = 77
VOCABULARY = 49408

SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


def new_unet() -> UNet2DConditionModel:
    """The denoiser, as in ``unet/config.json`` of CompVis/stable-diffusion-v1-4."""
    return UNet2DConditionModel(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        cross_attention_dim=768,
        attention_head_dim=8,
    )


def new_vae() -> AutoencoderKL:
    """The autoencoder, as in ``vae/config.json`` of the same repository."""
    return AutoencoderKL(
        sample_size=512,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The text model of openai/clip-vit-large-patch14, with the special tokens of ``tokenizer``."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=768,
            intermediate_size=3072,
            projection_dim=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=TOKENS,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_tokenizer(folder: Path) -> CLIPTokenizer:
    """The demo model's tokenizer, written into ``folder``, with CLIP's length of a prompt.

    CLIP's own vocabulary would be a download; the choice of tokens does not affect time or memory.
    """
    write_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8")) | {"model_max_length": TOKENS}
    path.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
    return tokenizer


def write_sd14(folder: Path, device: torch.device = CPU) -> Path:
    """Write the pipeline into ``folder``, 2.1 GB in float16; returns it.

    Its weights are made on ``device``: a GPU needs seconds, a CPU a minute and 4 GB of memory. The
    folder appears atomically, when it is complete.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".sd14-") as name:
        tokenizer = new_tokenizer(Path(name) / "tokenizer")
        with device:
            # Convert each one before creating the next: in float32 they take twice as much.
            unet, vae = new_unet().half(), new_vae().half()
            text_encoder = new_text_encoder(tokenizer).half()
        pipeline = StableDiffusionPipeline(
            unet=unet,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=PNDMScheduler(**SCHEDULER),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        fresh = Path(name) / "fresh"
        pipeline.save_pretrained(fresh)
        if folder.exists():
            shutil.rmtree(folder)
        fresh.rename(folder)
    return folder


def cached_sd14(device: torch.device = CPU) -> Path:
    """The folder in the user's cache (``XDG_CACHE_HOME``), which the first call writes."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "darkroom" / "bench" / "sd14"
    return folder if (folder / "model_index.json").is_file() else write_sd14(folder, device)
