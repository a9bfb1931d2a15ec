"""FLUX.1 dev and schnell, tiny, in the real folder format."""

from pathlib import Path
from typing import Any

import diffusers

from bench.tiny_families.case import FamilyCase, mixed_jobs
from bench.tiny_families.parts import clip, flow_match, set_size, shaken, t5, vae
from darkroom_server.core.job import Job


def write_flux(
    folder: Path, *, guidance_embeds: bool, kind: str = "FluxPipeline", **scheduler: Any
) -> Path:
    """A FLUX.1 of 64×64 pixels, with a pipeline of class ``kind``.

    ``scheduler`` is configuration.
    """
    tokenizer, encoder = clip(folder / "tokenizer")
    tokenizer_2, encoder_2 = t5()
    getattr(diffusers, kind)(
        transformer=shaken(
            diffusers.FluxTransformer2DModel(
                patch_size=1,
                in_channels=16,
                out_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                pooled_projection_dim=32,
                axes_dims_rope=(4, 4, 8),
                guidance_embeds=guidance_embeds,
            )
        ),
        scheduler=flow_match(**scheduler),
        vae=vae(shift_factor=0.1),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
    ).save_pretrained(folder)
    return set_size(folder)


def write_dev(folder: Path) -> Path:
    """The one that takes the guidance scale as an input."""
    return write_flux(folder, guidance_embeds=True, use_dynamic_shifting=True, shift=3.0)


def write_schnell(folder: Path) -> Path:
    """The one without guidance."""
    return write_flux(folder, guidance_embeds=False, shift=1.0)


def call(job: Job) -> dict[str, Any]:
    """The arguments with which a user of diffusers asks for ``job``."""
    return {
        "prompt": job.prompt,
        "prompt_2": job.prompt_2 or None,
        "negative_prompt": job.negative_prompt or ("" if job.empty_negative_prompt else None),
        "negative_prompt_2": job.negative_prompt_2 or None,
        "true_cfg_scale": job.true_cfg_scale,
        "guidance_scale": job.guidance_scale,
        "max_sequence_length": job.max_sequence_length,
    }


SHORT = {"max_sequence_length": 32}

DEV = mixed_jobs(
    SHORT,
    {**SHORT, "true_cfg_scale": 3.0, "negative_prompt": "blue", "negative_prompt_2": "a ring"},
    {**SHORT, "prompt_2": "a small heart"},
    # Without a mask, this length cannot share a batch with the others.
    {"max_sequence_length": 48, "true_cfg_scale": 2.0},
    {**SHORT, "true_cfg_scale": 4.0, "empty_negative_prompt": True},
)

SCHNELL = mixed_jobs(SHORT, SHORT, SHORT, SHORT, SHORT)

CASES = [
    FamilyCase("FLUX.1 dev", write_dev, DEV, call, mixes_lengths=False),
    FamilyCase("FLUX.1 schnell", write_schnell, SCHNELL, call),
]
