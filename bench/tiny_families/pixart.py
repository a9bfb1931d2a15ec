"""PixArt-Sigma and PixArt-Alpha, tiny, in the real folder format."""

import json
from pathlib import Path
from typing import Any

import diffusers

from bench.tiny_families.case import FamilyCase, mixed_jobs
from bench.tiny_families.parts import set_size, shaken, t5, vae
from darkroom_server.core.job import Job


def write_pixart(pipeline: Any, folder: Path, sample_size: int) -> Path:
    """A PixArt of 64×64 pixels; ``sample_size`` is the transformer's."""
    tokenizer, encoder = t5()
    pipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae(),
        transformer=shaken(
            diffusers.PixArtTransformer2DModel(
                sample_size=sample_size,
                num_layers=2,
                patch_size=2,
                attention_head_dim=12,
                num_attention_heads=2,
                caption_channels=32,
                in_channels=4,
                cross_attention_dim=24,
                out_channels=8,
                attention_bias=True,
                activation_fn="gelu-approximate",
                num_embeds_ada_norm=1000,
                norm_type="ada_norm_single",
                norm_elementwise_affine=False,
                norm_eps=1e-6,
            )
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            beta_start=0.0001, beta_end=0.02, beta_schedule="linear"
        ),
    ).save_pretrained(folder)
    return set_size(folder)


def write_sigma(folder: Path) -> Path:
    """PixArt-Sigma."""
    return write_pixart(diffusers.PixArtSigmaPipeline, folder, sample_size=8)


def write_alpha(folder: Path) -> Path:
    """PixArt-Alpha of 1024 pixels, which takes the image's size, under its transformer's old name.

    The folders on the hub have that name.
    """
    write_pixart(diffusers.PixArtAlphaPipeline, folder, sample_size=128)
    index = folder / "model_index.json"
    parts = json.loads(index.read_text("utf-8"))
    parts["transformer"] = ["diffusers", "Transformer2DModel"]
    index.write_text(json.dumps(parts), "utf-8")
    config = folder / "transformer" / "config.json"
    fields = json.loads(config.read_text("utf-8"))
    config.write_text(json.dumps({**fields, "_class_name": "Transformer2DModel"}), "utf-8")
    return folder


def call(job: Job) -> dict[str, Any]:
    """The arguments with which a user of diffusers asks for ``job``."""
    return {
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "guidance_scale": job.guidance_scale,
        "max_sequence_length": job.max_sequence_length,
        "use_resolution_binning": False,
        "clean_caption": False,
    }


JOBS = mixed_jobs(
    {"max_sequence_length": 20},
    {"max_sequence_length": 32, "negative_prompt": "blue"},
    {"max_sequence_length": 20, "guidance_scale": 1.0},
    {"max_sequence_length": 48},
    {"max_sequence_length": 32},
)

CASES = [
    FamilyCase("PixArt-Sigma", write_sigma, JOBS, call, mixes_lengths=True),
    FamilyCase("PixArt-Alpha", write_alpha, JOBS, call, mixes_lengths=True),
]
