"""HunyuanImage 2.1 and what is distilled from it, tiny, in the real folder format."""

from pathlib import Path
from typing import Any

import diffusers
import transformers
from diffusers.guiders import AdaptiveProjectedMixGuidance

from bench.tiny_families.case import FamilyCase, mixed_jobs
from bench.tiny_families.parts import flow_match, qwen_tokenizer, set_size, shaken
from bench.tiny_families.qwen_image import TEMPLATE
from darkroom_server.core.job import Job


def write(folder: Path, *, distilled: bool) -> Path:
    """A model of images of 64×64 pixels, with a guider or with guidance as an input."""
    tokenizer = qwen_tokenizer(TEMPLATE)
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 2048,
                "rope_scaling": {"type": "default", "mrope_section": [4, 2, 2]},
                "bos_token_id": None,
                "eos_token_id": tokenizer.eos_token_id,
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 32,
            },
        )
    )
    tokenizer_2 = transformers.ByT5Tokenizer()
    encoder_2 = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=len(tokenizer_2), d_model=32, d_ff=37, d_kv=8, num_layers=2, num_heads=4
        )
    )
    guider = AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=0)
    diffusers.HunyuanImagePipeline(
        scheduler=flow_match(shift=5.0),
        vae=shaken(
            diffusers.AutoencoderKLHunyuanImage(
                in_channels=3,
                out_channels=3,
                latent_channels=4,
                block_out_channels=(32, 32, 32),
                layers_per_block=1,
                spatial_compression_ratio=4,
                sample_size=64,
                scaling_factor=0.75,
            )
        ),
        text_encoder=shaken(encoder),
        tokenizer=tokenizer,
        text_encoder_2=shaken(encoder_2),
        tokenizer_2=tokenizer_2,
        transformer=shaken(
            diffusers.HunyuanImageTransformer2DModel(
                in_channels=4,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=8,
                num_layers=1,
                num_single_layers=1,
                num_refiner_layers=1,
                patch_size=(1, 1),
                guidance_embeds=distilled,
                use_meanflow=distilled,
                text_embed_dim=32,
                text_embed_2_dim=32,
                rope_axes_dim=(4, 4),
            )
        ),
        guider=None if distilled else guider,
    ).save_pretrained(folder)
    return set_size(folder, 32)


def write_base(folder: Path) -> Path:
    """The base model: its guider turns two calls into a step."""
    return write(folder, distilled=False)


def write_distilled(folder: Path) -> Path:
    """A distilled model, whose denoiser also takes the next timestep."""
    return write(folder, distilled=True)


def call(job: Job) -> dict[str, Any]:
    """The arguments with which a user of diffusers asks for ``job``."""
    return {"prompt": job.prompt, "negative_prompt": job.negative_prompt or None}


def call_distilled(job: Job) -> dict[str, Any]:
    """The arguments with which a user of diffusers asks for ``job``."""
    return {"prompt": job.prompt, "distilled_guidance_scale": job.guidance_scale}


BASE = mixed_jobs(
    {"steps": 4},
    {"steps": 3, "negative_prompt": "blue"},
    {"steps": 3, "prompt": 'a red ring with "star" on it'},
    {"steps": 2},
    {"steps": 3},
)

DISTILLED = mixed_jobs({"steps": 4}, {"steps": 3}, {"steps": 2}, {"steps": 3}, {"steps": 3})

CASES = [
    FamilyCase("HunyuanImage", write_base, BASE, call),
    FamilyCase("HunyuanImage distilled", write_distilled, DISTILLED, call_distilled),
]
