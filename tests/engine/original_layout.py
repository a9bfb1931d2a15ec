"""The original (LDM) layout of a pipeline's weights: what diffusers' conversion reads, inverted."""

import re
from typing import Any

import torch

UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
}


def original_layout(pipeline: Any) -> dict[str, torch.Tensor]:
    """The weights of a whole pipeline under the names of a single-file checkpoint."""
    found: dict[str, torch.Tensor] = {}
    unet = pipeline.unet.state_dict()
    for key, weight in unet.items():
        found["model.diffusion_model." + _unet_key(key, pipeline.unet.config, unet)] = weight
    blocks = len(pipeline.vae.config.block_out_channels)
    for key, weight in pipeline.vae.state_dict().items():
        # Attention was made of convolutions of one pixel.
        convolution = "mid_block.attentions" in key and weight.ndim == 2
        found["first_stage_model." + _vae_key(key, blocks)] = (
            weight[:, :, None, None] if convolution else weight
        )
    for key, weight in pipeline.text_encoder.state_dict().items():
        name = key.removeprefix("text_model.")
        found[f"cond_stage_model.transformer.text_model.{name}"] = weight
    # Which the original files have, and which nothing reads any more.
    tokens = pipeline.tokenizer.model_max_length
    found["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(tokens)[
        None
    ]
    found["alphas_cumprod"] = pipeline.scheduler.alphas_cumprod
    return {key: weight.clone().contiguous() for key, weight in found.items()}


def _unet_key(key: str, config: Any, weights: dict[str, torch.Tensor]) -> str:
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", key)
    if match is None:
        key = _renamed(key, UNET)
        return (
            _renamed(key, RESNET) if key.startswith(("middle_block.0", "middle_block.2")) else key
        )
    side, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    per_block = config.layers_per_block + 1
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * per_block}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        # It follows the last layer's attention, if there is one.
        place = 1 + any(k.startswith(f"up_blocks.{block}.attentions") for k in weights)
        return f"output_blocks.{(block + 1) * per_block - 1}.{place}.{rest}"
    number = block * per_block + layer
    blocks = f"input_blocks.{number + 1}" if side == "down" else f"output_blocks.{number}"
    if kind == "attentions":
        return f"{blocks}.1.{rest}"
    return f"{blocks}.0.{_renamed(rest, RESNET)}"


def _vae_key(key: str, blocks: int) -> str:
    key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d+)", r"down.\1", key)
    key = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{blocks - 1 - int(m[1])}", key)
    return _renamed(key.replace("resnets", "block") if "up." in key else key, VAE)


def _renamed(key: str, names: dict[str, str]) -> str:
    for new, old in names.items():
        key = re.sub(rf"(?<![\w]){re.escape(new)}(?=\.|$)", old, key)
    return key
