"""Lumina-Image 2.0, tiny, in the real folder format."""

from pathlib import Path

import diffusers

from bench.tiny_families.case import FamilyCase, guided_call, mixed_jobs
from bench.tiny_families.parts import flow_match, gemma, shaken, vae

SYSTEM = (
    "You are an assistant designed to generate superior images with the superior degree of "
    "image-text alignment based on textual prompts or user prompts. <Prompt Start> "
)
"""Before each prompt; the tokenizer must not spend many tokens on it."""


def write_lumina_2(folder: Path) -> Path:
    """A Lumina-Image 2.0 of 64×64 pixels."""
    tokenizer, encoder = gemma(16, SYSTEM)
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 64, 64),
        cap_feat_dim=16,
    )
    diffusers.Lumina2Pipeline(
        transformer=shaken(transformer),
        scheduler=flow_match(shift=6.0),
        vae=vae(shift_factor=0.1),
        text_encoder=encoder,
        tokenizer=tokenizer,
    ).save_pretrained(folder)
    return folder


JOBS = mixed_jobs(
    {"max_sequence_length": 96},
    {"max_sequence_length": 80, "negative_prompt": "blue"},
    {"max_sequence_length": 80, "guidance_scale": 1.0},
    {"max_sequence_length": 72, "negative_prompt": "a large yellow star on a blue background"},
    {"max_sequence_length": 80},
)

CASES = [FamilyCase("Lumina 2", write_lumina_2, JOBS, guided_call, mixes_lengths=True)]
