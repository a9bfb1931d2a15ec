"""HiDream-I1, tiny, in the real folder format."""

from pathlib import Path
from typing import Any

import diffusers
import transformers

from bench.tiny_families.case import FamilyCase, guided_call, mixed_jobs
from bench.tiny_families.parts import clip, flow_match, shaken, t5
from bench.tiny_families.trained import bpe
from darkroom_server.core.job import Job

LLAMA_LAYERS = 3


def write_hidream(folder: Path) -> Path:
    """A HiDream of 128×128 pixels and as many latent pixels: its pipeline knows no other area."""
    tokenizer, encoder = clip(folder / "tokenizer", projection=True, positions=128)
    tokenizer_2, encoder_2 = clip(folder / "tokenizer_2", projection=True, positions=128)
    tokenizer_3, encoder_3 = t5()
    tokenizer_4 = bpe()
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer_4),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=LLAMA_LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=512,
            bos_token_id=tokenizer_4.bos_token_id,
            eos_token_id=tokenizer_4.eos_token_id,
        )
    )
    diffusers.HiDreamImagePipeline(
        scheduler=flow_match(shift=3.0),
        vae=shaken(
            diffusers.AutoencoderKL(
                block_out_channels=(8,),
                norm_num_groups=4,
                latent_channels=4,
                sample_size=128,
                shift_factor=0.1,
                # It would be over as many tokens as the image has pixels.
                mid_block_add_attention=False,
            )
        ),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=encoder_3,
        tokenizer_3=tokenizer_3,
        text_encoder_4=shaken(llama),
        tokenizer_4=tokenizer_4,
        transformer=shaken(
            diffusers.HiDreamImageTransformer2DModel(
                patch_size=16,
                in_channels=4,
                out_channels=4,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=8,
                num_attention_heads=4,
                caption_channels=[32, 16],
                text_emb_dim=64,
                num_routed_experts=4,
                num_activated_experts=2,
                axes_dims_rope=(4, 2, 2),
                max_resolution=(128, 128),
                llama_layers=(0, 2),
            )
        ),
    ).save_pretrained(folder)
    return folder


def call(job: Job) -> dict[str, Any]:
    """The arguments with which a user of diffusers asks for ``job``."""
    return {
        **guided_call(job),
        "prompt_2": job.prompt_2 or None,
        "prompt_3": job.prompt_3 or None,
        "negative_prompt_3": job.negative_prompt_3 or None,
    }


SHORT = {"max_sequence_length": 32}

JOBS = mixed_jobs(
    SHORT,
    {**SHORT, "negative_prompt": "blue", "negative_prompt_3": "a heart"},
    {**SHORT, "guidance_scale": 1.0, "prompt_2": "a small heart"},
    # Without a mask, this length cannot share a batch with the others.
    {"max_sequence_length": 48},
    {**SHORT, "prompt_3": "a green ring"},
)

CASES = [
    FamilyCase(
        "HiDream",
        write_hidream,
        JOBS,
        call,
        rows_in="encoder_hidden_states_t5",
        timestep="timesteps",
        mixes_lengths=False,
    )
]
