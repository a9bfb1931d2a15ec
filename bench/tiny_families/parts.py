"""Tiny parts of pipelines, with random weights."""

import json
from pathlib import Path
from typing import Any

import diffusers
import tokenizers
import torch
import transformers

from training.prompts import WORDS
from training.tokenizer import write_tokenizer

DIFFUSION: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def shaken(module: Any, seed: int = 0) -> Any:
    """``module`` with random weights, none of which is zero or one by its initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim >= 2:
                weight.copy_(noise / max(1, weight[0].numel()) ** 0.5)
            elif "norm" in name and name.endswith("weight"):
                weight.copy_(1 + 0.1 * noise)
            else:
                weight.copy_(0.1 * noise)
    return module.eval().requires_grad_(False)


def vae(channels: int = 4, *, sample_size: int = 64, **config: Any) -> Any:
    """A VAE of 8 pixels for each latent pixel, on each side."""
    return shaken(
        diffusers.AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=channels,
            sample_size=sample_size,
            **config,
        )
    )


def clip(
    folder: Path,
    width: int = 32,
    *,
    projection: bool = False,
    positions: int | None = None,
    layers: int = 3,
) -> tuple[Any, Any]:
    """A tokenizer, which is written to ``folder``, and a CLIP text encoder.

    ``positions``: the longest prompt that the encoder takes, the tokenizer's if None.
    """
    tokenizer = write_tokenizer(folder)
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=positions or tokenizer.model_max_length,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return tokenizer, shaken(kind(config))


CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template in the form of Qwen's."""


def qwen_tokenizer(*texts: str) -> Any:
    """A Qwen2 tokenizer that is trained on the demo model's words and ``texts``."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=800, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator([" ".join(WORDS), *texts], trainer)
    model = json.loads(trained.to_str())["model"]
    return transformers.Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT,
    )


def t5(width: int = 32, *, multilingual: bool = False) -> tuple[Any, Any]:
    """A tokenizer with a token for each letter and each word of the grammar, and a T5 encoder.

    ``multilingual``: the encoder is a UMT5.
    """
    letters = [chr(code) for code in range(0x20, 0x7F)]
    pieces = [(piece, -8.0) for piece in letters] + [(f"\u2581{word}", -2.0) for word in WORDS]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("\u2581", -4.0)]
    tokenizer = transformers.T5TokenizerFast(
        vocab=special + pieces, extra_ids=0, model_max_length=512
    )
    kind: Any = transformers.UMT5EncoderModel if multilingual else transformers.T5EncoderModel
    config = kind.config_class(
        vocab_size=len(tokenizer),
        d_model=width,
        d_ff=37,
        d_kv=8,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return tokenizer, shaken(kind(config))


def flow_match(**config: Any) -> Any:
    """The scheduler of models that are trained by flow matching."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def set_size(folder: Path, size: int = 64) -> Path:
    """Make ``size`` the default of the model in ``folder``, whose class has a larger one."""
    (folder / "darkroom.json").write_text(json.dumps({"size": size}), "utf-8")
    return folder


def gemma(width: int = 16, *texts: str) -> tuple[Any, Any]:
    """A tokenizer that is trained on the demo model's words and ``texts``, and a Gemma 2."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    trained.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=800, special_tokens=special, show_progress=False
    )
    trained.train_from_iterator([" ".join(WORDS), *WORDS, *texts], trainer)
    model = json.loads(trained.to_str())["model"]
    tokenizer = transformers.GemmaTokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        model_max_length=512,
    )
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    config = transformers.Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer, shaken(transformers.Gemma2Model(config))
