"""Language models that encode prompts, by the facts of their published configurations."""

from typing import Any

import transformers
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel


def pile_t5_xl() -> Any:
    """The text encoder of AuraFlow, from EleutherAI/pile-t5-xl."""
    return transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=32128,
            d_model=2048,
            d_ff=5120,
            d_kv=64,
            num_layers=24,
            num_heads=32,
            feed_forward_proj="gated-gelu",
        )
    )


def glyph_byt5() -> Any:
    """The second text encoder of HunyuanImage 2.1, a google/byt5-small for glyphs."""
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=1510,
            d_model=1472,
            d_ff=3584,
            d_kv=64,
            num_layers=12,
            num_heads=6,
            feed_forward_proj="gated-gelu",
        )
    )


def _qwen3(hidden: int, inner: int, *, tied: bool) -> Any:
    return transformers.Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=tied,
    )


def qwen3_4b() -> Any:
    """Qwen/Qwen3-4B without a head, as in Z-Image."""
    return transformers.Qwen3Model(_qwen3(2560, 9728, tied=True))


def qwen3_4b_with_head() -> Any:
    """Qwen/Qwen3-4B, as in FLUX.2 klein 4B; its head is its embedding."""
    return transformers.Qwen3ForCausalLM(_qwen3(2560, 9728, tied=True))


def qwen3_8b_with_head() -> Any:
    """Qwen/Qwen3-8B, as in FLUX.2 klein 9B."""
    return transformers.Qwen3ForCausalLM(_qwen3(4096, 12288, tied=False))


def qwen2_5_vl_7b() -> Any:
    """Qwen/Qwen2.5-VL-7B-Instruct."""
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config={
                "vocab_size": 152064,
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "tie_word_embeddings": False,
            },
            vision_config={
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "out_hidden_size": 3584,
                "patch_size": 14,
                "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31],
            },
            tie_word_embeddings=False,
        )
    )


def mistral_small_3() -> Any:
    """mistralai/Mistral-Small-3.2-24B-Instruct-2506."""
    return transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(
            text_config={
                "model_type": "mistral",
                "vocab_size": 131072,
                "hidden_size": 5120,
                "intermediate_size": 32768,
                "num_hidden_layers": 40,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "tie_word_embeddings": False,
            },
            vision_config={
                "model_type": "pixtral",
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "head_dim": 64,
                "image_size": 1540,
                "patch_size": 14,
            },
            tie_word_embeddings=False,
        )
    )


def gemma_2_2b() -> Any:
    """google/gemma-2-2b-it without a head, as in Lumina 2 and Sana."""
    return transformers.Gemma2Model(
        transformers.Gemma2Config(
            vocab_size=256000,
            hidden_size=2304,
            intermediate_size=9216,
            num_hidden_layers=26,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=256,
        )
    )


def llama_3_1_8b() -> Any:
    """meta-llama/Llama-3.1-8B-Instruct."""
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            tie_word_embeddings=False,
        )
    )


def chatglm3_6b() -> Any:
    """The ChatGLM3 of Kwai-Kolors/Kolors-diffusers."""
    return ChatGLMModel(
        ChatGLMConfig(
            num_layers=28,
            padded_vocab_size=65024,
            hidden_size=4096,
            ffn_hidden_size=13696,
            kv_channels=128,
            num_attention_heads=32,
            seq_length=32768,
            add_qkv_bias=True,
            multi_query_attention=True,
            multi_query_group_num=2,
            original_rope=True,
        ),
        # Its own way to make layers without memory knows no default device.
        empty_init=False,
    )
