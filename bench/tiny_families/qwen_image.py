"""Qwen-Image, tiny, in the real folder format."""

from pathlib import Path
from typing import Any

import diffusers
import transformers

from bench.tiny_families.case import FamilyCase, mixed_jobs
from bench.tiny_families.parts import flow_match, qwen_tokenizer, set_size, shaken
from darkroom_server.core.job import Job


def qwen_image_parts(tokenizer: Any, **transformer: Any) -> dict[str, Any]:
    """The components of a Qwen-Image of 64×64 pixels; ``transformer`` is configuration."""
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 1100,
                "rope_scaling": {"type": "default", "mrope_section": [2, 1, 1]},
                "bos_token_id": None,
                "eos_token_id": tokenizer.eos_token_id,
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "out_hidden_size": 16,
            },
            image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
            vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        )
    )
    return {
        "transformer": shaken(
            diffusers.QwenImageTransformer2DModel(
                in_channels=16,
                out_channels=4,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=16,
                axes_dims_rope=(8, 4, 4),
                **transformer,
            )
        ),
        "scheduler": flow_match(
            use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        "vae": shaken(
            diffusers.AutoencoderKLQwenImage(
                base_dim=8,
                z_dim=4,
                dim_mult=[1, 1, 1, 1],
                num_res_blocks=1,
                latents_mean=[-0.7, 0.4, 0.1, -0.2],
                latents_std=[2.8, 1.5, 2.3, 0.9],
            )
        ),
        "text_encoder": shaken(encoder),
        "tokenizer": tokenizer,
    }


def write_qwen_image(folder: Path, **transformer: Any) -> Path:
    """A Qwen-Image of 64×64 pixels; ``transformer`` is configuration."""
    parts = qwen_image_parts(qwen_tokenizer(TEMPLATE), **transformer)
    diffusers.QwenImagePipeline(**parts).save_pretrained(folder)
    return set_size(folder)


TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}"
)
"""About the pipeline's own, of which it drops the first 34 tokens."""


def write_zero_cond_t(folder: Path) -> Path:
    """A transformer that has a second timestep of zero, for reference images."""
    return write_qwen_image(folder, zero_cond_t=True)


def call(job: Job) -> dict[str, Any]:
    """The arguments with which a user of diffusers asks for ``job``."""
    return {
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt or ("" if job.empty_negative_prompt else None),
        "true_cfg_scale": job.true_cfg_scale,
        "max_sequence_length": job.max_sequence_length or 512,
    }


LONG = "a large yellow star on a blue background with " * 4 + "a small red heart"

JOBS = mixed_jobs(
    {},
    {"true_cfg_scale": 4.0, "negative_prompt": "blue"},
    {"prompt": LONG, "true_cfg_scale": 4.0},
    {"true_cfg_scale": 2.5, "negative_prompt": LONG, "max_sequence_length": 40},
    {"true_cfg_scale": 3.0, "empty_negative_prompt": True},
)

CASES = [
    FamilyCase("Qwen-Image", write_qwen_image, JOBS, call, mixes_lengths=True),
    FamilyCase("Qwen-Image zero_cond_t", write_zero_cond_t, JOBS, call, mixes_lengths=True),
]
