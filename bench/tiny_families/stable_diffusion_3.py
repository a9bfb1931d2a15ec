"""Stable Diffusion 3, 3.5 and one without its T5, tiny, in the real folder format."""

from pathlib import Path
from typing import Any

import diffusers

from bench.tiny_families.case import FamilyCase, mixed_jobs
from bench.tiny_families.parts import clip, flow_match, shaken, t5, vae
from darkroom_server.core.job import Job


def write_sd3(
    folder: Path,
    *,
    with_t5: bool = True,
    channels: int = 4,
    width_2: int = 32,
    **transformer: Any,
) -> Path:
    """A Stable Diffusion 3 of 64×64 pixels; ``transformer`` is configuration.

    Its latents have ``channels``, its second text encoder is ``width_2`` wide.
    """
    tokenizer, encoder = clip(folder / "tokenizer", projection=True)
    tokenizer_2, encoder_2 = clip(folder / "tokenizer_2", width_2, projection=True)
    tokenizer_3, encoder_3 = t5(64) if with_t5 else (None, None)
    diffusers.StableDiffusion3Pipeline(
        transformer=shaken(
            diffusers.SD3Transformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=channels,
                out_channels=channels,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=4,
                joint_attention_dim=64,
                caption_projection_dim=32,
                pooled_projection_dim=64,
                pos_embed_max_size=16,
                **transformer,
            )
        ),
        scheduler=flow_match(shift=3.0),
        vae=vae(channels, shift_factor=0.1),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=encoder_3,
        tokenizer_3=tokenizer_3,
    ).save_pretrained(folder)
    return folder


def write_dual_attention(folder: Path) -> Path:
    """As 3.5 medium: a second attention in some layers, normalised queries and keys."""
    return write_sd3(folder, dual_attention_layers=(0,), qk_norm="rms_norm")


def write_without_t5(folder: Path) -> Path:
    """A folder whose third text encoder was left out."""
    return write_sd3(folder, with_t5=False)


def call(job: Job) -> dict[str, Any]:
    """The arguments with which a user of diffusers asks for ``job``."""
    return {
        "prompt": job.prompt,
        "prompt_2": job.prompt_2 or None,
        "prompt_3": job.prompt_3 or None,
        "negative_prompt": job.negative_prompt or None,
        "negative_prompt_3": job.negative_prompt_3 or None,
        "guidance_scale": job.guidance_scale,
        "max_sequence_length": job.max_sequence_length or 256,
    }


SHORT = {"max_sequence_length": 32}

JOBS = mixed_jobs(
    SHORT,
    {**SHORT, "negative_prompt": "blue", "negative_prompt_3": "a ring"},
    {**SHORT, "prompt_2": "a small heart", "prompt_3": "a large heart"},
    # Without a mask, this length cannot share a batch with the others.
    {"max_sequence_length": 48},
    {**SHORT, "guidance_scale": 1.0},
)

WITHOUT_T5 = mixed_jobs({}, {"negative_prompt": "blue"}, {"prompt_2": "a heart"}, {}, {})

CASES = [
    FamilyCase("Stable Diffusion 3", write_sd3, JOBS, call, mixes_lengths=False),
    FamilyCase("Stable Diffusion 3.5", write_dual_attention, JOBS, call, mixes_lengths=False),
    FamilyCase(
        "Stable Diffusion 3 without T5",
        write_without_t5,
        WITHOUT_T5,
        call,
        load={"text_encoder_3": None, "tokenizer_3": None},
    ),
]
