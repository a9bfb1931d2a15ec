"""Z-Image and Z-Image-Turbo, tiny, in the real folder format."""

from pathlib import Path
from typing import Any

import diffusers
import transformers

from bench.tiny_families.case import FamilyCase, mixed_jobs
from bench.tiny_families.parts import qwen_tokenizer, shaken, vae
from darkroom_server.core.job import Job


def write_z_image(folder: Path, *, shift: float = 6.0) -> Path:
    """A Z-Image of 128×128 pixels; the base model has a scheduler with a ``shift`` of 6."""
    tokenizer = qwen_tokenizer()
    encoder = transformers.Qwen3Model(
        transformers.Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[258, 64, 64],
    )
    diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae(sample_size=128, scaling_factor=0.36, shift_factor=0.12),
        text_encoder=shaken(encoder),
        tokenizer=tokenizer,
        transformer=shaken(transformer),
    ).save_pretrained(folder)
    return folder


def write_turbo(folder: Path) -> Path:
    """A model distilled to a few steps without guidance."""
    return write_z_image(folder, shift=3.0)


def call(job: Job) -> dict[str, Any]:
    """The arguments with which a user of diffusers asks for ``job``."""
    return {
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt or None,
        "guidance_scale": job.guidance_scale,
        "max_sequence_length": job.max_sequence_length or 512,
    }


LONG = "a large yellow star on a blue background with " * 6 + "a small red heart"

BASE = mixed_jobs(
    {},
    {"negative_prompt": "blue", "width": 112},
    {"guidance_scale": 0.0, "prompt": LONG},
    {"guidance_scale": 0.5, "height": 96, "max_sequence_length": 16},
    {"width": 96, "height": 128, "negative_prompt": LONG},
)

TURBO = [
    {**fields, "guidance_scale": 0.0, "steps": steps}
    for fields, steps in zip(
        mixed_jobs({"prompt": LONG}, {"width": 96}, {}, {"height": 112}, {}),
        (4, 2, 4, 3, 4),
        strict=True,
    )
]

ROWS: dict[str, Any] = {"rows_in": "cap_feats", "timestep": "t", "mixes_lengths": True}

CASES = [
    FamilyCase("Z-Image", write_z_image, BASE, call, **ROWS),
    FamilyCase("Z-Image Turbo", write_turbo, TURBO, call, **ROWS),
]
