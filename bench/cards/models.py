"""The models of the page, one or two of each family: components, and inputs of one denoiser call.

Shapes are those of the model's default size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bench.cards import language_models as language
from bench.cards import modules

DTYPE = torch.bfloat16

Make = Callable[[], Any]
Inputs = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class CardModel:
    """A model: ``components`` with weights by their names in its folder, of ``pipeline``.

    ``rows``: those of one image, with guidance if the family guides by rows. ``inputs``: the
    arguments of a denoiser call of N rows; None if the denoiser reads values, which the meta
    device does not have. ``latents``: the shape of what the VAE decodes into one image.
    """

    name: str
    pipeline: str
    components: Mapping[str, Make]
    rows: int
    latents: tuple[int, ...]
    inputs: Callable[[int], Inputs] | None
    size: int = 1024

    @property
    def denoiser(self) -> str:
        """The name of the component that runs every step."""
        return "unet" if "unet" in self.components else "transformer"


def _random(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _unet(size: int, text: tuple[int, int], pooled: int = 0) -> Callable[[int], Inputs]:
    def inputs(rows: int) -> Inputs:
        found: Inputs = {
            "sample": _random(rows, 4, size // 8, size // 8),
            "timestep": _random(rows, dtype=torch.float32),
            "encoder_hidden_states": _random(rows, *text),
        }
        if pooled:
            found["added_cond_kwargs"] = {
                "text_embeds": _random(rows, pooled),
                "time_ids": _random(rows, 6),
            }
        return found

    return inputs


def _latents_and_text(
    latents: tuple[int, ...], text: tuple[int, int], **more: tuple[int, ...]
) -> Callable[[int], Inputs]:
    """Inputs of a transformer that takes latents as an image; ``more`` are rows of other shapes."""

    def inputs(rows: int) -> Inputs:
        return {
            "hidden_states": _random(rows, *latents),
            "encoder_hidden_states": _random(rows, *text),
            "timestep": _random(rows, dtype=torch.float32),
            **{name: _random(rows, *shape) for name, shape in more.items()},
        }

    return inputs


def _packed(
    channels: int, text: tuple[int, int], axes: int, **more: tuple[int, ...]
) -> Callable[[int], Inputs]:
    """Inputs of a transformer of FLUX's kind: 4,096 tokens of the image, ids of all tokens."""

    def inputs(rows: int) -> Inputs:
        found = _latents_and_text((4096, channels), text, **more)(rows)
        ids = {"img_ids": _random(4096, axes), "txt_ids": _random(text[0], axes)}
        return {**found, **ids}

    return inputs


def _qwen_inputs(rows: int) -> Inputs:
    return {
        **_latents_and_text((4096, 64), (256, 3584))(rows),
        "img_shapes": [[(1, 64, 64)]] * rows,
    }


def _pixart_inputs(rows: int) -> Inputs:
    return {
        **_latents_and_text((4, 128, 128), (300, 4096), encoder_attention_mask=(300,))(rows),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _z_image_inputs(rows: int) -> Inputs:
    return {
        "x": [_random(16, 1, 128, 128) for _ in range(rows)],
        "t": _random(rows, dtype=torch.float32),
        "cap_feats": [_random(256, 2560) for _ in range(rows)],
    }


SD3_TEXT = {
    "text_encoder": modules.projected_clip_l,
    "text_encoder_2": modules.clip_big_g,
    "text_encoder_3": modules.t5_xxl,
}
_SD3 = _latents_and_text((16, 128, 128), (333, 4096), pooled_projections=(2048,))
_SANA = _latents_and_text((32, 32, 32), (300, 2304), encoder_attention_mask=(300,))

MODELS = (
    CardModel(
        name="Stable Diffusion 1.5",
        pipeline="StableDiffusionPipeline",
        components={
            "unet": modules.sd_unet,
            "text_encoder": modules.clip_l,
            "vae": modules.sd_vae,
        },
        rows=2,
        latents=(1, 4, 64, 64),
        inputs=_unet(512, (77, 768)),
        size=512,
    ),
    CardModel(
        name="SDXL",
        pipeline="StableDiffusionXLPipeline",
        components={
            "unet": modules.sdxl_unet,
            "text_encoder": modules.clip_l,
            "text_encoder_2": modules.clip_big_g,
            "vae": modules.sdxl_vae,
        },
        rows=2,
        latents=(1, 4, 128, 128),
        inputs=_unet(1024, (77, 2048), 1280),
    ),
    CardModel(
        name="Kolors",
        pipeline="KolorsPipeline",
        components={
            "unet": modules.kolors_unet,
            "text_encoder": language.chatglm3_6b,
            "vae": modules.sdxl_vae,
        },
        rows=2,
        latents=(1, 4, 128, 128),
        inputs=_unet(1024, (256, 4096), 4096),
    ),
    CardModel(
        name="PixArt-Sigma",
        pipeline="PixArtSigmaPipeline",
        components={
            "transformer": modules.pixart_transformer,
            "text_encoder": modules.t5_xxl,
            "vae": modules.sdxl_vae,
        },
        rows=2,
        latents=(1, 4, 128, 128),
        inputs=_pixart_inputs,
    ),
    CardModel(
        name="Sana 1.6B",
        pipeline="SanaPipeline",
        components={
            "transformer": modules.sana_transformer,
            "text_encoder": language.gemma_2_2b,
            "vae": modules.sana_vae,
        },
        rows=2,
        latents=(1, 32, 32, 32),
        inputs=_SANA,
    ),
    CardModel(
        name="Sana Sprint 1.6B",
        pipeline="SanaSprintPipeline",
        components={
            "transformer": modules.sana_sprint_transformer,
            "text_encoder": language.gemma_2_2b,
            "vae": modules.sana_vae,
        },
        rows=1,
        latents=(1, 32, 32, 32),
        inputs=_latents_and_text(
            (32, 32, 32), (300, 2304), encoder_attention_mask=(300,), guidance=()
        ),
    ),
    CardModel(
        name="Lumina 2",
        pipeline="Lumina2Pipeline",
        components={
            "transformer": modules.lumina_2_transformer,
            "text_encoder": language.gemma_2_2b,
            "vae": modules.flux_vae,
        },
        rows=1,
        latents=(1, 16, 128, 128),
        inputs=None,
    ),
    CardModel(
        name="Stable Diffusion 3 medium",
        pipeline="StableDiffusion3Pipeline",
        components={"transformer": modules.sd3_transformer, **SD3_TEXT, "vae": modules.sd3_vae},
        rows=2,
        latents=(1, 16, 128, 128),
        inputs=_SD3,
    ),
    CardModel(
        name="Stable Diffusion 3.5 medium",
        pipeline="StableDiffusion3Pipeline",
        components={
            "transformer": modules.sd35_medium_transformer,
            **SD3_TEXT,
            "vae": modules.sd3_vae,
        },
        rows=2,
        latents=(1, 16, 128, 128),
        inputs=_SD3,
    ),
    CardModel(
        name="Stable Diffusion 3.5 large",
        pipeline="StableDiffusion3Pipeline",
        components={
            "transformer": modules.sd35_large_transformer,
            **SD3_TEXT,
            "vae": modules.sd3_vae,
        },
        rows=2,
        latents=(1, 16, 128, 128),
        inputs=_SD3,
    ),
    CardModel(
        name="Z-Image",
        pipeline="ZImagePipeline",
        components={
            "transformer": modules.z_image_transformer,
            "text_encoder": language.qwen3_4b,
            "vae": modules.flux_vae,
        },
        rows=2,
        latents=(1, 16, 128, 128),
        inputs=_z_image_inputs,
    ),
    CardModel(
        name="AuraFlow",
        pipeline="AuraFlowPipeline",
        components={
            "transformer": modules.aura_flow_transformer,
            "text_encoder": language.pile_t5_xl,
            "vae": modules.sdxl_vae,
        },
        rows=2,
        latents=(1, 4, 128, 128),
        inputs=_latents_and_text((4, 128, 128), (256, 2048)),
    ),
    CardModel(
        name="FLUX.2 klein 4B",
        pipeline="Flux2KleinPipeline",
        components={
            "transformer": modules.klein_4b_transformer,
            "text_encoder": language.qwen3_4b_with_head,
            "vae": modules.flux_2_vae,
        },
        rows=1,
        latents=(1, 32, 128, 128),
        inputs=_packed(128, (512, 7680), 4),
    ),
    CardModel(
        name="FLUX.2 klein 9B",
        pipeline="Flux2KleinPipeline",
        components={
            "transformer": modules.klein_9b_transformer,
            "text_encoder": language.qwen3_8b_with_head,
            "vae": modules.flux_2_vae,
        },
        rows=1,
        latents=(1, 32, 128, 128),
        inputs=_packed(128, (512, 12288), 4),
    ),
    CardModel(
        name="Chroma",
        pipeline="ChromaPipeline",
        components={
            "transformer": modules.chroma_transformer,
            "text_encoder": modules.t5_xxl,
            "vae": modules.flux_vae,
        },
        rows=1,
        latents=(1, 16, 128, 128),
        inputs=_packed(64, (512, 4096), 3, attention_mask=(4608,)),
    ),
    CardModel(
        name="FLUX.1",
        pipeline="FluxPipeline",
        components={
            "transformer": modules.flux_transformer,
            "text_encoder": modules.clip_l,
            "text_encoder_2": modules.t5_xxl,
            "vae": modules.flux_vae,
        },
        rows=1,
        latents=(1, 16, 128, 128),
        inputs=_packed(64, (512, 4096), 3, pooled_projections=(768,), guidance=()),
    ),
    CardModel(
        name="HiDream-I1",
        pipeline="HiDreamImagePipeline",
        components={
            "transformer": modules.hidream_transformer,
            "text_encoder": modules.long_clip_l,
            "text_encoder_2": modules.long_clip_big_g,
            "text_encoder_3": modules.t5_xxl,
            "text_encoder_4": language.llama_3_1_8b,
            "vae": modules.flux_vae,
        },
        rows=2,
        latents=(1, 16, 128, 128),
        inputs=None,
    ),
    CardModel(
        name="HunyuanImage 2.1",
        pipeline="HunyuanImagePipeline",
        components={
            "transformer": modules.hunyuan_transformer,
            "text_encoder": language.qwen2_5_vl_7b,
            "text_encoder_2": language.glyph_byt5,
            "vae": modules.hunyuan_vae,
        },
        rows=1,
        latents=(1, 64, 64, 64),
        inputs=None,
        size=2048,
    ),
    CardModel(
        name="Qwen-Image",
        pipeline="QwenImagePipeline",
        components={
            "transformer": modules.qwen_transformer,
            "text_encoder": language.qwen2_5_vl_7b,
            "vae": modules.qwen_vae,
        },
        rows=1,
        latents=(1, 16, 1, 128, 128),
        inputs=_qwen_inputs,
    ),
    CardModel(
        name="FLUX.2 dev",
        pipeline="Flux2Pipeline",
        components={
            "transformer": modules.flux_2_transformer,
            "text_encoder": language.mistral_small_3,
            "vae": modules.flux_2_vae,
        },
        rows=1,
        latents=(1, 32, 128, 128),
        inputs=_packed(128, (512, 15360), 4, guidance=()),
    ),
)
"""From the smallest to the largest, about."""

ALIKE = {
    "StableDiffusionInpaintPipeline": "StableDiffusionPipeline",
    "StableDiffusionXLInpaintPipeline": "StableDiffusionXLPipeline",
    "PixArtAlphaPipeline": "PixArtSigmaPipeline",
    "FluxKontextPipeline": "FluxPipeline",
    "QwenImageEditPipeline": "QwenImagePipeline",
    "QwenImageEditPlusPipeline": "QwenImagePipeline",
}
"""Families whose models have about the bytes of another's."""
