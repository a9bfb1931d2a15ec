"""AuraFlow, tiny, in the real folder format."""

from pathlib import Path

import diffusers

from bench.tiny_families.case import FamilyCase, guided_call, mixed_jobs
from bench.tiny_families.parts import flow_match, set_size, shaken, t5, vae


def write_aura_flow(folder: Path) -> Path:
    """An AuraFlow of 64×64 pixels."""
    tokenizer, encoder = t5(multilingual=True)
    diffusers.AuraFlowPipeline(
        transformer=shaken(
            diffusers.AuraFlowTransformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_mmdit_layers=1,
                num_single_dit_layers=1,
                attention_head_dim=8,
                num_attention_heads=4,
                caption_projection_dim=32,
                joint_attention_dim=32,
                pos_embed_max_size=64,
            )
        ),
        scheduler=flow_match(shift=1.73),
        vae=vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
    ).save_pretrained(folder)
    return set_size(folder)


SHORT = {"max_sequence_length": 32}

JOBS = mixed_jobs(
    SHORT,
    {**SHORT, "negative_prompt": "blue"},
    {**SHORT, "guidance_scale": 1.0},
    # Without a mask, this length cannot share a batch with the others.
    {"max_sequence_length": 48},
    SHORT,
)

CASES = [FamilyCase("AuraFlow", write_aura_flow, JOBS, guided_call, mixes_lengths=False)]
