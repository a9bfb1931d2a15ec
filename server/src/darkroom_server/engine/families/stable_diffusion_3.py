"""Stable Diffusion 3 and 3.5: two CLIP text encoders and a T5, a transformer.

The tokens of CLIP and T5 follow each other without a mask, so prompts are never padded to the
length of others. A folder may do without the T5, which is most of its weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from darkroom_server.core.inputs import InputImage
from darkroom_server.core.job import Job, Task
from darkroom_server.core.model import ModelLimits
from darkroom_server.engine.conditioning.image_encoder import ImageEncoder
from darkroom_server.engine.controls.kind import ControlKind
from darkroom_server.engine.controls.latents import control_latents
from darkroom_server.engine.families.half_dtypes import HOLDS_IN_FLOAT16
from darkroom_server.engine.families.several_prompts import is_cut
from darkroom_server.engine.families.suspended import TransformerFamily
from darkroom_server.engine.loading.defaults import Defaults
from darkroom_server.engine.pipelines.arguments import Arguments, ArgumentSpec, Kind

TRANSFORMER = ArgumentSpec(
    denoiser="SD3Transformer2DModel",
    kinds={
        "hidden_states": Kind.ROWS,
        "encoder_hidden_states": Kind.ROWS,
        "pooled_projections": Kind.ROWS,
        "timestep": Kind.TIMESTEP,
        "return_dict": Kind.EQUAL,
    },
    rows_in="hidden_states",
    signature="89122164bd272377",
    diffusers="0.42",
)


class StableDiffusion3Controls(ControlKind):
    """``SD3ControlNetModel``, which reads latents of its image."""

    spec = TRANSFORMER
    net_class = "SD3ControlNetModel"
    matched = ("in_channels", "num_attention_heads", "attention_head_dim", "pooled_projection_dim")
    residuals: ClassVar[Mapping[str, Kind]] = {"block_controlnet_hidden_states": Kind.PER_BLOCK}

    def mismatch(self, config: Mapping[str, Any], denoiser: Any) -> str:
        """Why a ControlNet of ``config`` does not fit ``denoiser``; empty if it does."""
        if found := super().mismatch(config, denoiser):
            return found
        if config.get("extra_conditioning_channels"):
            return "it reads a mask besides its image, which is not supported"
        width, wanted = config.get("joint_attention_dim"), denoiser.config.joint_attention_dim
        if width not in (None, wanted):
            return f"its joint_attention_dim is {width}, the model's is {wanted}"
        return ""

    def prepare(self, net: Any, denoiser: Any) -> None:
        """Share the positions of the denoiser with a net that has none."""
        if net.config.use_pos_embed is False:
            positions = net._get_pos_embed_from_transformer(denoiser)
            net.pos_embed = positions.to(net.dtype).to(net.device)

    def noise(self, generator: torch.Generator) -> torch.Generator:
        """One of its own with the sample's seed: the pipeline takes torch's global one."""
        return torch.Generator("cpu").manual_seed(generator.initial_seed())

    def condition(
        self,
        image: InputImage,
        rows: int,
        net: Any,
        images: ImageEncoder,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """The latents of ``image``; without their shift for a net that reads no pooled prompt."""
        unshifted = net.config.force_zeros_for_pooled_projection
        shift = 0 if unshifted else images.vae.config.shift_factor
        return control_latents(image, rows, images, generator, shift).to(net.device, net.dtype)

    def arguments(self, given: Arguments, net: Any) -> dict[str, Any]:
        """Those of the transformer that a ControlNet has too."""
        names = ["hidden_states", "timestep", "pooled_projections"]
        if net.config.joint_attention_dim is not None:
            names.append("encoder_hidden_states")
        arguments = {name: given[name] for name in names}
        if net.config.force_zeros_for_pooled_projection:
            arguments["pooled_projections"] = torch.zeros_like(given["pooled_projections"])
        return arguments

    def layout(self, net: Any) -> int:
        """The number of its residuals."""
        return len(net.controlnet_blocks)

    def spread(
        self, name: str, parts: Sequence[torch.Tensor], net: Any, denoiser: Any
    ) -> Sequence[torch.Tensor]:
        """As the transformer does with a list of any length."""
        blocks = len(denoiser.transformer_blocks)
        return [parts[int(block / (blocks / len(parts)))] for block in range(blocks)]


T5_TOKENS = 256
MAX_T5_TOKENS = 512
"""The pipeline rejects a greater ``max_sequence_length``."""


class StableDiffusion3(TransformerFamily):
    """The family of ``StableDiffusion3Pipeline``."""

    pipeline_class = "StableDiffusion3Pipeline"
    components = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    dispensable = ("text_encoder_3", "tokenizer_3")
    optional = ("image_encoder", "feature_extractor")
    defaults = Defaults(steps=28, guidance_scale=7.0)
    tasks: ClassVar[Mapping[Task, str]] = {
        Task.IMAGE_TO_IMAGE: "StableDiffusion3Img2ImgPipeline",
        Task.INPAINT: "StableDiffusion3InpaintPipeline",
    }
    spec = TRANSFORMER
    control_kind = StableDiffusion3Controls()
    half = HOLDS_IN_FLOAT16
    size_multiple_factor = 2

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        if self.has_t5:
            self.prompt_tokenizer = "tokenizer_3"

    @property
    def has_t5(self) -> bool:
        """Whether the third text encoder is there: without it, the prompt is CLIP's tokens."""
        return self.pipeline.text_encoder_3 is not None

    @property
    def model_defaults(self) -> Defaults:
        """3.5 medium has dual attention, 3.5 large and medium normalise queries and keys."""
        config = self.pipeline.transformer.config
        if config.dual_attention_layers:
            return Defaults(steps=40, guidance_scale=4.5)
        if config.qk_norm:
            return Defaults(steps=28, guidance_scale=3.5)
        return self.defaults

    @property
    def optional_fields(self) -> frozenset[str]:
        """Those of ``core.model.OPTIONAL_FIELDS`` that the model takes."""
        fields = {"guidance_scale", "negative_prompt", "negative_prompt_2", "prompt_2", "preview"}
        if self.has_t5:
            fields |= {"negative_prompt_3", "prompt_3", "max_sequence_length"}
        return frozenset(fields)

    @property
    def prompt_tokens(self) -> int:
        """Tokens that the model reads of a prompt by default, the end mark included."""
        return T5_TOKENS if self.has_t5 else super().prompt_tokens

    @property
    def most_tokens(self) -> int:
        """The greatest ``max_sequence_length``, if there is a T5: the pipeline rejects more."""
        return MAX_T5_TOKENS

    def is_truncated(self, job: Job) -> bool:
        """Whether no text encoder reads a prompt of ``job`` to its end."""
        clip = ("tokenizer", "tokenizer_2")
        windows = {name: getattr(self.pipeline, name).model_max_length for name in clip}
        if self.has_t5:
            windows["tokenizer_3"] = job.max_sequence_length or self.prompt_tokens
        return is_cut(job, self.pipeline, windows)

    def limits(self, max_rows: int) -> ModelLimits:
        """Half to twice the size that the model was trained at, if it has the positions for it."""
        limits = super().limits(max_rows)
        config = self.pipeline.transformer.config
        side = config.pos_embed_max_size * config.patch_size * self.latent_factor
        return replace(limits, max_size=min(limits.max_size, side))
