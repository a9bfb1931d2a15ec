"""FLUX.1 and FLUX.1 Kontext: a CLIP and a T5 text encoder, a transformer over packed latents.

Its text tokens have no mask, so prompts are never padded to the length of others.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from darkroom_server.core.inputs import InputImage
from darkroom_server.core.job import Job, Task
from darkroom_server.core.model import Guidance
from darkroom_server.engine.conditioning.image_encoder import ImageEncoder
from darkroom_server.engine.controls.kind import ControlKind
from darkroom_server.engine.controls.latents import control_latents, signed_pixels
from darkroom_server.engine.families.half_dtypes import CLIPPED_IN_FLOAT16
from darkroom_server.engine.families.packed_latents import PackedLatentsFamily, pack_latents
from darkroom_server.engine.families.several_prompts import is_cut
from darkroom_server.engine.loading.defaults import Defaults
from darkroom_server.engine.pipelines.arguments import Arguments, ArgumentSpec, Kind

TRANSFORMER = ArgumentSpec(
    denoiser="FluxTransformer2DModel",
    kinds={
        "hidden_states": Kind.ROWS,
        "encoder_hidden_states": Kind.ROWS,
        "pooled_projections": Kind.ROWS,
        "timestep": Kind.TIMESTEP,
        "guidance": Kind.ROWS,
        "img_ids": Kind.SAME,
        "txt_ids": Kind.SAME,
        "return_dict": Kind.EQUAL,
    },
    rows_in="hidden_states",
    signature="89cb6e5990d80cf0",
    diffusers="0.42",
)


class FluxControls(ControlKind):
    """``FluxControlNetModel``: one that reads latents of its image, or one with a hint block."""

    spec = TRANSFORMER
    net_class = "FluxControlNetModel"
    matched = (
        "in_channels",
        "num_attention_heads",
        "attention_head_dim",
        "joint_attention_dim",
        "pooled_projection_dim",
    )
    residuals: ClassVar[Mapping[str, Kind]] = {
        "controlnet_block_samples": Kind.PER_BLOCK,
        "controlnet_single_block_samples": Kind.PER_BLOCK,
    }
    prompts = ("encoder_hidden_states", "pooled_projections")

    def mismatch(self, config: Mapping[str, Any], denoiser: Any) -> str:
        """Why a ControlNet of ``config`` does not fit ``denoiser``; empty if it does."""
        if found := super().mismatch(config, denoiser):
            return found
        if config.get("num_mode") is not None:
            return "it is a union of several, which is not supported"
        if config.get("guidance_embeds") and not denoiser.config.guidance_embeds:
            return "it takes the guidance scale as an input, and the model does not"
        return ""

    def condition(
        self,
        image: InputImage,
        rows: int,
        net: Any,
        images: ImageEncoder,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """The latents of ``image`` as tokens, or its pixels for a net with a hint block."""
        if net.input_hint_block is not None:
            return signed_pixels(image).to(net.device, net.dtype)
        latents = control_latents(image, 1, images, generator, images.vae.config.shift_factor)
        return pack_latents(latents).to(net.device, net.dtype)

    def arguments(self, given: Arguments, net: Any) -> dict[str, Any]:
        """Those of the transformer that a ControlNet has too."""
        names = ["hidden_states", "timestep", *self.prompts, "img_ids", "txt_ids"]
        if net.config.guidance_embeds:
            names.append("guidance")
        return {name: given[name] for name in names}

    def layout(self, net: Any) -> tuple[int, int, bool]:
        """The numbers of its residuals, and whether they repeat."""
        blocks, singles = net.controlnet_blocks, net.controlnet_single_blocks
        return len(blocks), len(singles), net.input_hint_block is not None

    def spread(
        self, name: str, parts: Sequence[torch.Tensor], net: Any, denoiser: Any
    ) -> Sequence[torch.Tensor]:
        """As the transformer does with a list of any length; a hint block's repeats."""
        if name == "controlnet_block_samples":
            blocks = len(denoiser.transformer_blocks)
            if net.input_hint_block is not None:
                return [parts[block % len(parts)] for block in range(blocks)]
        else:
            blocks = len(denoiser.single_transformer_blocks)
        each = math.ceil(blocks / len(parts))
        return [parts[block // each] for block in range(blocks)]


MAX_TOKENS = 512
"""The pipeline rejects a greater ``max_sequence_length``."""

SCHNELL_TOKENS = 256
"""The length of the prompts that schnell was trained on."""


class Flux(PackedLatentsFamily):
    """The family of ``FluxPipeline``: dev, which takes the guidance as an input, and schnell."""

    pipeline_class = "FluxPipeline"
    components = ("transformer", "vae", "text_encoder", "text_encoder_2")
    optional = ("image_encoder", "feature_extractor")
    defaults = Defaults(steps=28, guidance_scale=3.5)
    tasks: ClassVar[Mapping[Task, str]] = {
        Task.IMAGE_TO_IMAGE: "FluxImg2ImgPipeline",
        Task.INPAINT: "FluxInpaintPipeline",
    }
    spec = TRANSFORMER
    control_kind: ClassVar[ControlKind | None] = FluxControls()
    half = CLIPPED_IN_FLOAT16
    prompt_tokenizer = "tokenizer_2"

    @property
    def takes_guidance(self) -> bool:
        """Whether the guidance scale is an input of the transformer."""
        return bool(self.pipeline.transformer.config.guidance_embeds)

    @property
    def model_defaults(self) -> Defaults:
        """schnell, which has no input for the guidance, is distilled to four steps."""
        if self.takes_guidance:
            return self.defaults
        return Defaults(steps=4, guidance_scale=0.0)

    @property
    def guidance(self) -> Guidance:
        """A second call for the negative prompt, if there is one."""
        return Guidance(scale="true_cfg_scale", needs_negative=True, rows=1, calls=2)

    @property
    def optional_fields(self) -> frozenset[str]:
        """Those of ``core.model.OPTIONAL_FIELDS`` that the model takes."""
        fields = {
            "true_cfg_scale",
            "negative_prompt",
            "negative_prompt_2",
            "empty_negative_prompt",
            "prompt_2",
            "max_sequence_length",
            "preview",
        }
        return frozenset(fields | ({"guidance_scale"} if self.takes_guidance else set()))

    @property
    def prompt_tokens(self) -> int:
        """Tokens that the model reads of a prompt by default, the end mark included."""
        return MAX_TOKENS if self.takes_guidance else SCHNELL_TOKENS

    def is_truncated(self, job: Job) -> bool:
        """Whether no text encoder reads a prompt of ``job`` to its end."""
        windows = {
            "tokenizer": self.pipeline.tokenizer.model_max_length,
            "tokenizer_2": job.max_sequence_length or self.prompt_tokens,
        }
        return is_cut(job, self.pipeline, windows)

    @property
    def most_tokens(self) -> int:
        """The greatest ``max_sequence_length``: the pipeline rejects more."""
        return MAX_TOKENS


class FluxKontext(Flux):
    """The family of ``FluxKontextPipeline``: it edits one image, or starts from text alone."""

    pipeline_class = "FluxKontextPipeline"
    # The scale is that of the model's card.
    defaults = Defaults(steps=28, guidance_scale=2.5)
    tasks: ClassVar[Mapping[Task, str]] = {Task.EDIT: "FluxKontextPipeline"}
    # They have no residuals for the tokens of a reference image.
    control_kind = None

    def call_arguments(self, job: Job) -> dict[str, Any]:
        """The arguments of the pipeline's call for ``job``.

        With the area of ``job``: the pipeline rescales each size to the one that it is given.
        """
        return super().call_arguments(job) | {"max_area": job.width * job.height}
