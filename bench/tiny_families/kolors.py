"""Kolors, tiny, in the real folder format."""

import io
from pathlib import Path
from typing import Any

import diffusers
import sentencepiece
from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig

from bench.tiny_families.case import FamilyCase, mixed_jobs
from bench.tiny_families.parts import DIFFUSION, shaken, vae
from darkroom_server.core.job import Job
from training.prompts import WORDS


def save_sentencepiece(file: Path, **ids: Any) -> None:
    """A SentencePiece model that is trained on the demo model's words; ``ids`` of its marks."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS), *WORDS]),
        model_writer=model,
        vocab_size=120,
        hard_vocab_limit=False,
        minloglevel=2,
        **ids,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(model.getvalue())


def write_kolors(folder: Path) -> Path:
    """A Kolors of 64×64 pixels."""
    vocabulary = folder / "tokenizer" / "tokenizer.model"
    save_sentencepiece(vocabulary)
    tokens = ChatGLMTokenizer(str(vocabulary))
    encoder = ChatGLMModel(
        ChatGLMConfig(
            num_layers=3,
            padded_vocab_size=tokens.vocab_size,
            hidden_size=32,
            ffn_hidden_size=37,
            kv_channels=8,
            num_attention_heads=4,
            seq_length=256,
            multi_query_attention=True,
            multi_query_group_num=2,
            add_qkv_bias=True,
            original_rope=True,
        )
    )
    diffusers.KolorsPipeline(
        vae=vae(),
        text_encoder=shaken(encoder),
        tokenizer=tokens,
        unet=shaken(
            diffusers.UNet2DConditionModel(
                block_out_channels=(16, 32),
                norm_num_groups=8,
                layers_per_block=1,
                sample_size=8,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                attention_head_dim=(2, 4),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                transformer_layers_per_block=(1, 2),
                projection_class_embeddings_input_dim=80,
                encoder_hid_dim=32,
                encoder_hid_dim_type="text_proj",
                cross_attention_dim=24,
            )
        ),
        scheduler=diffusers.EulerDiscreteScheduler(**DIFFUSION),
        force_zeros_for_empty_prompt=False,
    ).save_pretrained(folder)
    return folder


def call(job: Job) -> dict[str, Any]:
    """The arguments with which a user of diffusers asks for ``job``."""
    return {
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt or None,
        "guidance_scale": job.guidance_scale,
    }


JOBS = mixed_jobs({}, {"negative_prompt": "blue"}, {}, {"guidance_scale": 1.0}, {})

# With transformers 5.6, on a CPU with AVX-512, one of these images is 1.14e-5 away.
CASES = [FamilyCase("Kolors", write_kolors, JOBS, call, tolerance=2e-5)]
