"""The UNet of Stable Diffusion and SDXL: what its arguments are, and its ControlNets."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers.image_processor import VaeImageProcessor

from darkroom_server.core.inputs import InputImage
from darkroom_server.engine.conditioning.image_encoder import ImageEncoder
from darkroom_server.engine.conditioning.input_images import pil_image
from darkroom_server.engine.controls.kind import ControlKind
from darkroom_server.engine.pipelines.arguments import Arguments, ArgumentSpec, Kind

UNET = ArgumentSpec(
    denoiser="UNet2DConditionModel",
    kinds={
        "sample": Kind.ROWS,
        "timestep": Kind.TIMESTEP,
        "encoder_hidden_states": Kind.ROWS,
        "timestep_cond": Kind.ROWS,
        "added_cond_kwargs.text_embeds": Kind.ROWS,
        "added_cond_kwargs.time_ids": Kind.ROWS,
        # A list with a tensor for each IP-Adapter.
        "added_cond_kwargs.image_embeds": Kind.PER_BLOCK,
        "return_dict": Kind.EQUAL,
    },
    rows_in="sample",
    signature="77d680c563abf52d",
    diffusers="0.42",
)


class UNetControls(ControlKind):
    """``ControlNetModel``, which reads the pixels of its image."""

    spec = UNET
    net_class = "ControlNetModel"
    matched = (
        "cross_attention_dim",
        "block_out_channels",
        "layers_per_block",
        "addition_embed_type",
        "projection_class_embeddings_input_dim",
    )
    residuals: ClassVar[Mapping[str, Kind]] = {
        "down_block_additional_residuals": Kind.PER_BLOCK,
        "mid_block_additional_residual": Kind.ROWS,
    }

    def mismatch(self, config: Mapping[str, Any], denoiser: Any) -> str:
        """Why a ControlNet of ``config`` does not fit ``denoiser``; empty if it does."""
        if found := super().mismatch(config, denoiser):
            return found
        if config.get("global_pool_conditions"):
            return "it pools its condition, which is not supported"
        if config.get("conditioning_channels", 3) != 3:
            return f"it reads images of {config['conditioning_channels']} channels, not of 3"
        # A UNet that inpaints has the mask and the masked image in further channels.
        own, most = config.get("in_channels", 4), denoiser.config.out_channels
        return "" if own == most else f"its in_channels is {own}, the model's latents have {most}"

    def condition(
        self,
        image: InputImage,
        rows: int,
        net: Any,
        images: ImageEncoder,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """The pixels of ``image``, 0 to 1, [1, 3, height, width]."""
        processor = VaeImageProcessor(do_convert_rgb=True, do_normalize=False)
        pixels: torch.Tensor = processor.preprocess(pil_image(image), image.height, image.width)
        # As in diffusers: another layout may change the last bits.
        return pixels.contiguous().to(device=net.device, dtype=net.dtype)

    def arguments(self, given: Arguments, net: Any) -> dict[str, Any]:
        """Those of the UNet that a ControlNet has too."""
        added = given.get("added_cond_kwargs") or {}
        arguments = {
            "sample": given["sample"][:, : net.config.in_channels],
            "timestep": given["timestep"],
            "encoder_hidden_states": given["encoder_hidden_states"],
        }
        if net.config.addition_embed_type is not None:
            names = ("text_embeds", "time_ids")
            arguments["added_cond_kwargs"] = {name: added[name] for name in names}
        return arguments


UNET_CONTROLS = UNetControls()
