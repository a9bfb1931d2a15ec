"""Stable Diffusion XL and what is distilled from it, tiny, in the real folder format."""

from pathlib import Path
from typing import Any

import diffusers

from bench.tiny_families.case import FamilyCase, mixed_jobs
from bench.tiny_families.parts import DIFFUSION, clip, shaken, vae
from darkroom_server.core.job import Job


def write_sdxl(
    folder: Path,
    *,
    unet: dict[str, Any] | None = None,
    width_2: int = 32,
    layers_2: int = 3,
    **scheduler: Any,
) -> Path:
    """A Stable Diffusion XL of 64×64 pixels; ``unet`` and ``scheduler`` change configurations.

    ``width_2`` and ``layers_2`` are of the second text encoder.
    """
    tokenizer, encoder = clip(folder / "tokenizer")
    tokenizer_2, encoder_2 = clip(folder / "tokenizer_2", width_2, projection=True, layers=layers_2)
    diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=encoder,
        text_encoder_2=encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=shaken(
            diffusers.UNet2DConditionModel(
                block_out_channels=(16, 32),
                norm_num_groups=8,
                layers_per_block=1,
                sample_size=8,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                attention_head_dim=(2, 4),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                transformer_layers_per_block=(1, 2),
                projection_class_embeddings_input_dim=80,
                cross_attention_dim=32 + width_2,
                **(unet or {}),
            )
        ),
        scheduler=diffusers.EulerDiscreteScheduler(**{**DIFFUSION, **scheduler}),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def call(job: Job) -> dict[str, Any]:
    """The arguments with which a user of diffusers asks for ``job``."""
    return {
        "prompt": job.prompt,
        "prompt_2": job.prompt_2 or None,
        "negative_prompt": job.negative_prompt or ("" if job.empty_negative_prompt else None),
        "guidance_scale": job.guidance_scale,
        "guidance_rescale": job.guidance_rescale,
    }


def write_v_prediction(folder: Path) -> Path:
    """A fine-tune that predicts velocity, with zero signal at the first timestep."""
    return write_sdxl(
        folder,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def write_distilled(folder: Path) -> Path:
    """A guidance-distilled UNet, which takes the guidance scale as an input."""
    return write_sdxl(folder, unet={"time_cond_proj_dim": 16})


def write_turbo(folder: Path) -> Path:
    """A model distilled to a few steps without guidance."""
    return write_sdxl(folder, timestep_spacing="trailing")


TURBO = [
    {**fields, "guidance_scale": 0.0, "steps": steps}
    for fields, steps in zip(mixed_jobs({}, {}, {}, {}, {}), (4, 2, 4, 3, 4), strict=True)
]

BASE = mixed_jobs(
    {},
    {"negative_prompt": "blue", "negative_prompt_2": "", "guidance_rescale": 0.7},
    {"prompt_2": "a small heart"},
    {"guidance_scale": 1.0},
    {"empty_negative_prompt": True},
)

CASES = [
    FamilyCase("SDXL", write_sdxl, BASE, call),
    # With zero signal the first sigma is 4096, by which Euler multiplies the last bits.
    FamilyCase("SDXL v-prediction", write_v_prediction, BASE, call, tolerance=1e-4),
    FamilyCase("SDXL Turbo", write_turbo, TURBO, call),
    FamilyCase("SDXL distilled", write_distilled, mixed_jobs({}, {}, {}, {}, {}), call),
]
