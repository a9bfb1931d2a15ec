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
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
OPEN_CLIP = {
    "encoder.layers": "transformer.resblocks",
    "embeddings.token_embedding": "token_embedding",
    "final_layer_norm": "ln_final",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "fc1": "c_fc",
    "fc2": "c_proj",
    "self_attn": "attn",
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
    found.update(vae_in_original_layout(pipeline.vae))
    two = hasattr(pipeline, "text_encoder_2")
    clip = ("conditioner.embedders.0" if two else "cond_stage_model") + ".transformer.text_model."
    for key, weight in pipeline.text_encoder.state_dict().items():
        found[clip + key.removeprefix("text_model.")] = weight
    if two:
        found.update(_open_clip(pipeline.text_encoder_2.state_dict()))
    # Which the original files have, and which nothing reads any more.
    tokens = pipeline.tokenizer.model_max_length
    found[clip + "embeddings.position_ids"] = torch.arange(tokens)[None]
    found["alphas_cumprod"] = pipeline.scheduler.alphas_cumprod
    return {key: weight.clone().contiguous() for key, weight in found.items()}


def vae_in_original_layout(vae: Any) -> dict[str, torch.Tensor]:
    """The weights of ``vae`` under the names of a single-file checkpoint."""
    found: dict[str, torch.Tensor] = {}
    blocks = len(vae.config.block_out_channels)
    for key, weight in vae.state_dict().items():
        # Attention was made of convolutions of one pixel.
        convolution = "mid_block.attentions" in key and weight.ndim == 2
        found["first_stage_model." + _vae_key(key, blocks)] = (
            weight[:, :, None, None] if convolution else weight
        )
    return found


def _open_clip(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The second text encoder of Stable Diffusion XL, with one matrix for q, k and v."""
    found: dict[str, torch.Tensor] = {}
    for key, weight in weights.items():
        name = key.removeprefix("text_model.")
        if name == "text_projection.weight":
            found["text_projection"] = weight.T
        elif name == "embeddings.position_embedding.weight":
            found["positional_embedding"] = weight
        elif "q_proj" in name:
            parts = [
                weights[key.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")
            ]
            joined = _renamed(name, OPEN_CLIP).replace(".q_proj.", ".in_proj_")
            found[joined] = torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            found[_renamed(name, OPEN_CLIP)] = weight
    return {f"conditioner.embedders.1.model.{name}": weight for name, weight in found.items()}


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
