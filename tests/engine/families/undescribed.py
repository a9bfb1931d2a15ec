"""Tiny pipelines of real classes that no family describes."""

from pathlib import Path
from typing import Any

import diffusers

from bench.tiny_families.parts import DIFFUSION, clip, shaken, vae


def write_sag(folder: Path) -> Path:
    """Self-attention guidance: two calls for each step, and it writes to its denoiser."""
    tokenizer, encoder = clip(folder / "tokenizer")
    diffusers.StableDiffusionSAGPipeline(
        vae=vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=shaken(
            diffusers.UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(16, 32),
                norm_num_groups=8,
                layers_per_block=1,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=32,
                attention_head_dim=4,
            )
        ),
        scheduler=diffusers.DDIMScheduler(**DIFFUSION, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def write_amused(folder: Path) -> Path:
    """Masked tokens in place of noise, and a decoder that takes further arguments."""
    tokenizer, encoder = clip(folder / "tokenizer", projection=True)
    diffusers.AmusedPipeline(
        vqvae=shaken(
            diffusers.VQModel(
                block_out_channels=(8, 8, 8, 8),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                latent_channels=8,
                norm_num_groups=8,
                num_vq_embeddings=31,
                mid_block_add_attention=False,
                lookup_from_codebook=True,
            )
        ),
        tokenizer=tokenizer,
        text_encoder=encoder,
        transformer=shaken(
            diffusers.UVit2DModel(
                hidden_size=32,
                cond_embed_dim=32,
                micro_cond_encode_dim=2,
                micro_cond_embed_dim=10,
                encoder_hidden_size=32,
                vocab_size=32,
                codebook_size=31,
                in_channels=16,
                block_out_channels=16,
                num_res_blocks=1,
                downsample=True,
                upsample=True,
                block_num_heads=2,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
                sample_size=8,
            )
        ),
        scheduler=diffusers.AmusedScheduler(mask_token_id=31),
    ).save_pretrained(folder)
    return folder


WRITERS: dict[str, Any] = {
    "StableDiffusionSAGPipeline": write_sag,
    "AmusedPipeline": write_amused,
}
"""By the class of the pipeline."""
