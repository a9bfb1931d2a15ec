"""Modules of published models, by the facts of their configurations.

Each function makes one, on the device that ``torch.device`` sets: on ``meta`` it takes no memory.
"""

from collections.abc import Mapping
from typing import Any

import diffusers
import transformers

# ---- VAEs ----


def _vae(**config: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        **config,
    )


def sd_vae() -> Any:
    """The VAE of Stable Diffusion 1.x, and of PixArt-Alpha."""
    return _vae(latent_channels=4, sample_size=512)


def sdxl_vae() -> Any:
    """The VAE of stabilityai/stable-diffusion-xl-base-1.0; others have it too."""
    return _vae(latent_channels=4, sample_size=1024, scaling_factor=0.13025)


def sd3_vae() -> Any:
    """The VAE of stabilityai/stable-diffusion-3-medium."""
    return _vae(
        latent_channels=16,
        sample_size=1024,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def flux_vae() -> Any:
    """The VAE of black-forest-labs/FLUX.1-dev; others have it too."""
    return _vae(
        latent_channels=16,
        sample_size=1024,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def flux_2_vae() -> Any:
    """The VAE of black-forest-labs/FLUX.2-dev."""
    return diffusers.AutoencoderKLFlux2()


def qwen_vae() -> Any:
    """The VAE of Qwen/Qwen-Image."""
    return diffusers.AutoencoderKLQwenImage()


def sana_vae() -> Any:
    """The VAE of Sana, mit-han-lab/dc-ae-f32c32-sana-1.0."""
    blocks = (*("ResBlock",) * 3, *("EfficientViTBlock",) * 3)
    scales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    return diffusers.AutoencoderDC(
        latent_channels=32,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_layers_per_block=(2, 2, 2, 3, 3, 3),
        decoder_layers_per_block=(3, 3, 3, 3, 3, 3),
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    )


def hunyuan_vae() -> Any:
    """The VAE of tencent/HunyuanImage-2.1."""
    return diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=64,
        block_out_channels=(128, 256, 512, 512, 1024, 1024),
        layers_per_block=2,
        spatial_compression_ratio=32,
        sample_size=384,
    )


# ---- denoisers ----


def sd_unet() -> Any:
    """The UNet of CompVis/stable-diffusion-v1-4, and of 1.5."""
    return diffusers.UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8
    )


def sdxl_unet(**config: Any) -> Any:
    """The UNet of stabilityai/stable-diffusion-xl-base-1.0."""
    usual: dict[str, Any] = {"projection_class_embeddings_input_dim": 2816}
    return diffusers.UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        **{**usual, **config},
    )


def kolors_unet() -> Any:
    """The UNet of Kwai-Kolors/Kolors-diffusers: SDXL's, with projected text."""
    return sdxl_unet(
        encoder_hid_dim=4096,
        encoder_hid_dim_type="text_proj",
        projection_class_embeddings_input_dim=5632,
    )


def sd3_transformer(layers: int = 24, **config: Any) -> Any:
    """The transformer of stabilityai/stable-diffusion-3-medium, one head for each layer."""
    usual: dict[str, Any] = {"pos_embed_max_size": 192}
    return diffusers.SD3Transformer2DModel(
        sample_size=128,
        num_layers=layers,
        attention_head_dim=64,
        num_attention_heads=layers,
        joint_attention_dim=4096,
        caption_projection_dim=64 * layers,
        pooled_projection_dim=2048,
        **{**usual, **config},
    )


def sd35_medium_transformer() -> Any:
    """The transformer of stabilityai/stable-diffusion-3.5-medium."""
    return sd3_transformer(
        pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))
    )


def sd35_large_transformer() -> Any:
    """The transformer of stabilityai/stable-diffusion-3.5-large."""
    return sd3_transformer(38, qk_norm="rms_norm")


def flux_transformer() -> Any:
    """The transformer of black-forest-labs/FLUX.1-dev."""
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=128,
        num_attention_heads=24,
        joint_attention_dim=4096,
        pooled_projection_dim=768,
        guidance_embeds=True,
    )


def chroma_transformer() -> Any:
    """The transformer of lodestones/Chroma1-HD."""
    return diffusers.ChromaTransformer2DModel(
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=128,
        num_attention_heads=24,
        joint_attention_dim=4096,
        approximator_num_channels=64,
        approximator_hidden_dim=5120,
        approximator_layers=5,
    )


def aura_flow_transformer() -> Any:
    """The transformer of fal/AuraFlow-v0.3."""
    return diffusers.AuraFlowTransformer2DModel(
        num_mmdit_layers=4,
        num_single_dit_layers=32,
        attention_head_dim=256,
        num_attention_heads=12,
        joint_attention_dim=2048,
        caption_projection_dim=3072,
        pos_embed_max_size=9216,
    )


def pixart_transformer() -> Any:
    """The transformer of PixArt-alpha/PixArt-Sigma-XL-2-1024-MS; that of PixArt-Alpha is alike."""
    return diffusers.PixArtTransformer2DModel(
        sample_size=128,
        num_layers=28,
        num_attention_heads=16,
        attention_head_dim=72,
        cross_attention_dim=1152,
        caption_channels=4096,
        interpolation_scale=2,
        use_additional_conditions=False,
    )


def z_image_transformer() -> Any:
    """The transformer of Tongyi-MAI/Z-Image-Turbo, and of Z-Image."""
    return diffusers.ZImageTransformer2DModel(
        dim=3840, n_layers=30, n_refiner_layers=2, n_heads=30, n_kv_heads=30, cap_feat_dim=2560
    )


def qwen_transformer() -> Any:
    """The transformer of Qwen/Qwen-Image, and of its edit models."""
    return diffusers.QwenImageTransformer2DModel(
        num_layers=60, attention_head_dim=128, num_attention_heads=24, joint_attention_dim=3584
    )


def flux_2_transformer(
    layers: int = 8, single_layers: int = 48, heads: int = 48, text: int = 15360, **config: Any
) -> Any:
    """The transformer of black-forest-labs/FLUX.2-dev."""
    return diffusers.Flux2Transformer2DModel(
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=128,
        num_attention_heads=heads,
        joint_attention_dim=text,
        **config,
    )


def klein_4b_transformer() -> Any:
    """The transformer of black-forest-labs/FLUX.2-klein-4B."""
    return flux_2_transformer(5, 20, 24, 7680, guidance_embeds=False)


def klein_9b_transformer() -> Any:
    """The transformer of black-forest-labs/FLUX.2-klein-9B."""
    return flux_2_transformer(8, 24, 32, 12288, guidance_embeds=False)


def lumina_2_transformer() -> Any:
    """The transformer of Alpha-VLLM/Lumina-Image-2.0."""
    return diffusers.Lumina2Transformer2DModel(
        hidden_size=2304,
        num_layers=26,
        num_refiner_layers=2,
        num_attention_heads=24,
        num_kv_heads=8,
        cap_feat_dim=2304,
    )


def sana_transformer(**config: Any) -> Any:
    """The transformer of Efficient-Large-Model/Sana_1600M_1024px_diffusers."""
    return diffusers.SanaTransformer2DModel(
        num_layers=20,
        num_attention_heads=70,
        attention_head_dim=32,
        caption_channels=2304,
        **config,
    )


def sana_sprint_transformer() -> Any:
    """The transformer of Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers."""
    return sana_transformer(guidance_embeds=True, qk_norm="rms_norm_across_heads")


def hunyuan_transformer() -> Any:
    """The transformer of hunyuanvideo-community/HunyuanImage-2.1-Diffusers."""
    return diffusers.HunyuanImageTransformer2DModel(
        num_layers=20, num_single_layers=40, text_embed_dim=3584, text_embed_2_dim=1472
    )


def hidream_transformer() -> Any:
    """The transformer of HiDream-ai/HiDream-I1-Full."""
    return diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=16,
        num_single_layers=32,
        attention_head_dim=128,
        num_attention_heads=20,
        caption_channels=[4096, 4096],
        text_emb_dim=2048,
        axes_dims_rope=(64, 32, 32),
        llama_layers=[*range(32), *(31,) * 16],
    )


# ---- text encoders ----

_CLIP_L: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_CLIP_BIG_G: Mapping[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}


def clip_l() -> Any:
    """The text model of openai/clip-vit-large-patch14."""
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**_CLIP_L))


def _projected(config: Mapping[str, Any], tokens: int = 77) -> Any:
    found = transformers.CLIPTextConfig(**config, max_position_embeddings=tokens)
    return transformers.CLIPTextModelWithProjection(found)


def projected_clip_l() -> Any:
    """The same with its projection, as in Stable Diffusion 3."""
    return _projected(_CLIP_L)


def clip_big_g() -> Any:
    """The second text model of SDXL and Stable Diffusion 3, with its projection."""
    return _projected(_CLIP_BIG_G)


def long_clip_l() -> Any:
    """The first text model of HiDream-I1, which takes more tokens."""
    return _projected(_CLIP_L, 248)


def long_clip_big_g() -> Any:
    """Its second text model."""
    return _projected(_CLIP_BIG_G, 218)


def t5_xxl() -> Any:
    """The encoder of google/t5-v1_1-xxl."""
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=32128,
            d_model=4096,
            d_ff=10240,
            d_kv=64,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
        )
    )
