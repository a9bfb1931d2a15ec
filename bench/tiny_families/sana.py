"""Sana and Sana Sprint, tiny, in the real folder format."""

from pathlib import Path
from typing import Any

import diffusers
import transformers

from bench.tiny_families.case import FamilyCase, mixed_jobs
from bench.tiny_families.parts import shaken
from bench.tiny_families.trained import bpe
from darkroom_server.core.job import Job


def parts(**transformer: Any) -> dict[str, Any]:
    """The components that both pipelines have, for images of 128×128 pixels."""
    tokenizer = bpe(transformers.GemmaTokenizer, model_max_length=512, add_bos_token=True)
    encoder = transformers.Gemma2Model(
        transformers.Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=2048,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": shaken(encoder),
        "vae": shaken(
            diffusers.AutoencoderDC(
                latent_channels=4,
                attention_head_dim=2,
                encoder_block_types=("ResBlock",) * 5 + ("EfficientViTBlock",),
                decoder_block_types=("ResBlock",) * 5 + ("EfficientViTBlock",),
                encoder_block_out_channels=(4,) * 6,
                decoder_block_out_channels=(4,) * 6,
                encoder_qkv_multiscales=((),) * 5 + ((5,),),
                decoder_qkv_multiscales=((),) * 5 + ((5,),),
                encoder_layers_per_block=(1,) * 6,
                decoder_layers_per_block=(1,) * 6,
                downsample_block_type="conv",
                upsample_block_type="interpolate",
                decoder_norm_types="rms_norm",
                decoder_act_fns="silu",
                scaling_factor=0.41407,
            )
        ),
        "transformer": shaken(
            diffusers.SanaTransformer2DModel(
                patch_size=1,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                num_attention_heads=2,
                attention_head_dim=4,
                num_cross_attention_heads=2,
                cross_attention_head_dim=4,
                cross_attention_dim=8,
                caption_channels=16,
                sample_size=4,
                **transformer,
            )
        ),
    }


def write_sana(folder: Path) -> Path:
    """A Sana, with its own scheduler of flow matching."""
    diffusers.SanaPipeline(
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        **parts(),
    ).save_pretrained(folder)
    return folder


def write_sprint(folder: Path) -> Path:
    """A Sana Sprint: guidance is an input, and the steps are few."""
    diffusers.SanaSprintPipeline(
        scheduler=diffusers.SCMScheduler(),
        **parts(guidance_embeds=True, qk_norm="rms_norm_across_heads"),
    ).save_pretrained(folder)
    return folder


def call(job: Job) -> dict[str, Any]:
    """The arguments with which a user of diffusers asks for ``job``."""
    return {
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "guidance_scale": job.guidance_scale,
        "max_sequence_length": job.max_sequence_length or 300,
        "use_resolution_binning": False,
    }


def call_sprint(job: Job) -> dict[str, Any]:
    """The arguments with which a user of diffusers asks for ``job``."""
    # diffusers takes an intermediate timestep for two steps only, and its default is one.
    few = {"intermediate_timesteps": 1.3 if job.steps == 2 else None}
    return {k: v for k, v in call(job).items() if k != "negative_prompt"} | few


JOBS = mixed_jobs(
    {},
    {"negative_prompt": "blue"},
    {"max_sequence_length": 64},
    {"guidance_scale": 1.0, "max_sequence_length": 64},
    {"max_sequence_length": 100},
)

SPRINT = [
    {**fields, "steps": steps, "negative_prompt": ""}
    for fields, steps in zip(JOBS, (2, 4, 2, 3, 6), strict=True)
]

CASES = [
    FamilyCase("Sana", write_sana, JOBS, call, mixes_lengths=True),
    FamilyCase("Sana Sprint", write_sprint, SPRINT, call_sprint, mixes_lengths=True),
]
