"""Small models of Stable Diffusion XL's and FLUX.1's architectures, with random weights.

Their sizes are fixed here, so that results of different days compare. The weights are random
because time does not depend on their values.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import transformers

from training.prompts import WORDS
from training.tokenizer import write_tokenizer

TEXT_WIDTH = 64
"""Of the output of each text encoder."""

T5_TOKENS = 32
"""Tokens of each prompt of the tiny FLUX.1; its prompts are shorter.

The usual 512 would be eight times as many as its image has.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyModel:
    """One model: ``write`` saves its pipeline into a folder.

    ``latents`` is the width and height of an image's latents. ``rows_per_image`` are those of each
    denoiser call. ``options`` are what every request sets: fields of a job, which are arguments of
    the pipeline too.
    """

    name: str
    latents: int
    rows_per_image: int
    options: Mapping[str, Any]
    write: Callable[[Path], None]


def sdxl(channels: tuple[int, int, int], heads: tuple[int, int, int], latents: int) -> TinyModel:
    """A Stable Diffusion XL: ``channels`` and attention ``heads`` of its UNet's three levels.

    It has as many layers as the real one, except in the deepest transformers: 4, not 10.
    """

    def write(folder: Path) -> None:
        tokenizer = write_tokenizer(folder / "tokenizer")
        unet = diffusers.UNet2DConditionModel(
            sample_size=latents,
            block_out_channels=channels,
            norm_num_groups=16,
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 4),
            attention_head_dim=heads,
            use_linear_projection=True,
            cross_attention_dim=2 * TEXT_WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=6 * 32 + TEXT_WIDTH,
        )
        diffusers.StableDiffusionXLPipeline(
            unet=unet,
            vae=_vae(channels=4, latents=latents),
            text_encoder=transformers.CLIPTextModel(_clip_config(tokenizer)),
            tokenizer=tokenizer,
            text_encoder_2=transformers.CLIPTextModelWithProjection(_clip_config(tokenizer)),
            tokenizer_2=tokenizer,
            scheduler=diffusers.EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
            ),
            add_watermarker=False,
        ).save_pretrained(folder)

    return TinyModel(name="SDXL", latents=latents, rows_per_image=2, options={}, write=write)


def flux(heads: int, latents: int) -> TinyModel:
    """A FLUX.1 dev: a transformer of ``heads`` × 64 channels, with half the real blocks."""
    size = latents * 8

    def write(folder: Path) -> None:
        tokenizer = write_tokenizer(folder / "tokenizer")
        tokenizer_2 = _t5_tokenizer()
        transformer = diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=9,
            num_single_layers=18,
            attention_head_dim=64,
            num_attention_heads=heads,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            axes_dims_rope=(8, 28, 28),
            guidance_embeds=True,
        )
        text_encoder_2 = transformers.T5EncoderModel(
            transformers.T5Config(
                vocab_size=len(tokenizer_2),
                d_model=TEXT_WIDTH,
                d_ff=128,
                d_kv=16,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
            )
        )
        diffusers.FluxPipeline(
            transformer=transformer,
            vae=_vae(channels=16, latents=latents),
            text_encoder=transformers.CLIPTextModel(_clip_config(tokenizer)),
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
                shift=3.0, use_dynamic_shifting=True
            ),
        ).save_pretrained(folder)
        # The class has a default of its own, 1024 pixels.
        (folder / "darkroom.json").write_text(json.dumps({"size": size}), "utf-8")

    options = {"width": size, "height": size, "max_sequence_length": T5_TOKENS}
    return TinyModel(name="FLUX.1", latents=latents, rows_per_image=1, options=options, write=write)


MODELS = (
    sdxl((32, 64, 112), (1, 2, 7), latents=16),
    sdxl((64, 128, 160), (2, 4, 5), latents=16),
    sdxl((64, 128, 160), (2, 4, 5), latents=24),
    flux(heads=2, latents=16),
    flux(heads=3, latents=16),
    flux(heads=3, latents=24),
)
"""Three of each; the first of each is the one that has goals: 10 million weights."""


def _vae(channels: int, latents: int) -> Any:
    """A VAE about as fast as the demo model's, which decodes in half precision too."""
    return diffusers.AutoencoderKL(
        latent_channels=channels,
        sample_size=latents * 8,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        shift_factor=0.0,
        # The engine would decode in float32, and the pipeline not: it upcasts float16 only.
        force_upcast=False,
    )


def _clip_config(tokenizer: Any) -> Any:
    return transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=128,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _t5_tokenizer() -> Any:
    """A tokenizer that has a piece for each word of the demo model's prompts."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0)]
    words = [(f"\u2581{word}", -1.0) for word in WORDS]
    return transformers.T5TokenizerFast(vocab=special + words, extra_ids=0, model_max_length=512)
