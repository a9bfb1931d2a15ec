"""Chroma, tiny, in the real folder format."""

from pathlib import Path

import diffusers

from bench.tiny_families.case import FamilyCase, guided_call, mixed_jobs
from bench.tiny_families.parts import flow_match, set_size, shaken, t5, vae


def write_chroma(folder: Path) -> Path:
    """A Chroma of 64×64 pixels."""
    tokenizer, encoder = t5()
    diffusers.ChromaPipeline(
        transformer=shaken(
            diffusers.ChromaTransformer2DModel(
                patch_size=1,
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                axes_dims_rope=(4, 4, 8),
                approximator_hidden_dim=32,
                approximator_layers=1,
                approximator_num_channels=16,
            )
        ),
        scheduler=flow_match(),
        vae=vae(shift_factor=0.1),
        text_encoder=encoder,
        tokenizer=tokenizer,
    ).save_pretrained(folder)
    return set_size(folder)


SHORT = {"max_sequence_length": 32}

JOBS = mixed_jobs(
    SHORT,
    {**SHORT, "negative_prompt": "blue"},
    {**SHORT, "guidance_scale": 1.0},
    {"max_sequence_length": 48},
    SHORT,
)

CASES = [FamilyCase("Chroma", write_chroma, JOBS, guided_call, mixes_lengths=False)]
