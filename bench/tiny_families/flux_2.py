"""FLUX.2 dev and klein, tiny, in the real folder format."""

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

from bench.tiny_families.case import FamilyCase, mixed_jobs
from bench.tiny_families.parts import flow_match, qwen_tokenizer, set_size, shaken
from darkroom_server.core.job import Job


def vae() -> Any:
    """A VAE of 8 pixels for each latent pixel, with statistics of a batch norm."""
    made = shaken(
        diffusers.AutoencoderKLFlux2(
            block_out_channels=(8, 8, 8, 8),
            norm_num_groups=4,
            latent_channels=4,
            sample_size=64,
        )
    )
    generator = torch.Generator().manual_seed(1)
    made.bn.running_mean.copy_(torch.randn(16, generator=generator))
    made.bn.running_var.copy_(0.5 + torch.rand(16, generator=generator))
    return made


def transformer(**config: Any) -> Any:
    """A transformer whose text has three states of 16 values a token."""
    return shaken(
        diffusers.Flux2Transformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            axes_dims_rope=(4, 4, 4, 4),
            **config,
        )
    )


def write_klein(folder: Path, *, is_distilled: bool = False) -> Path:
    """A FLUX.2 klein of 64×64 pixels."""
    tokenizer = qwen_tokenizer()
    encoder = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            # The pipeline reads the states after 9, 18 and 27 layers.
            num_hidden_layers=27,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    diffusers.Flux2KleinPipeline(
        scheduler=flow_match(use_dynamic_shifting=True, shift=3.0),
        vae=vae(),
        text_encoder=shaken(encoder),
        tokenizer=tokenizer,
        transformer=transformer(guidance_embeds=False),
        is_distilled=is_distilled,
    ).save_pretrained(folder)
    return set_size(folder)


def write_flux_2_dev(folder: Path) -> Path:
    """A FLUX.2 dev of 64×64 pixels, whose tokenizer reads no images."""
    tokenizer = qwen_tokenizer(SYSTEM_MESSAGE)
    tokenizer.chat_template = CHAT_WITH_PARTS
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 24,
        # The pipeline reads the states after 10, 20 and 30 layers.
        "num_hidden_layers": 30,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 512,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "image_size": 32,
        "patch_size": 16,
    }
    encoder = transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(
            text_config={"model_type": "mistral", **text},
            vision_config={"model_type": "pixtral", **vision},
        )
    )
    diffusers.Flux2Pipeline(
        scheduler=flow_match(use_dynamic_shifting=True, shift=3.0),
        vae=vae(),
        text_encoder=shaken(encoder),
        tokenizer=tokenizer,
        transformer=transformer(guidance_embeds=True),
    ).save_pretrained(folder)
    return set_size(folder)


CHAT_WITH_PARTS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
)
"""A chat template of messages that have parts, as those of models that read images."""


def write_distilled_klein(folder: Path) -> Path:
    """One that takes no guidance."""
    return write_klein(folder, is_distilled=True)


def call(job: Job) -> dict[str, Any]:
    """The arguments with which a user of diffusers asks for ``job``."""
    return {
        "prompt": job.prompt,
        "guidance_scale": job.guidance_scale,
        "max_sequence_length": job.max_sequence_length,
    }


SHORT = {"max_sequence_length": 48}

LONGER = {"max_sequence_length": 96}
"""Room for the system message of dev."""

KLEIN = mixed_jobs(
    SHORT,
    {**SHORT, "guidance_scale": 1.0},
    SHORT,
    # Without a mask, this length cannot share a batch with the others.
    {"max_sequence_length": 64},
    SHORT,
)

DEV = mixed_jobs(LONGER, LONGER, LONGER, {"max_sequence_length": 112}, LONGER)

DISTILLED = mixed_jobs(SHORT, SHORT, SHORT, SHORT, SHORT)

CASES = [
    FamilyCase("FLUX.2 dev", write_flux_2_dev, DEV, call, mixes_lengths=False),
    FamilyCase("FLUX.2 klein base", write_klein, KLEIN, call, mixes_lengths=False),
    FamilyCase("FLUX.2 klein", write_distilled_klein, DISTILLED, call),
]
