"""FLUX.1: a CLIP and a T5 text encoder, a transformer over packed latents.

Its text tokens have no mask, so prompts are never padded to the length of others.
"""

from dataclasses import replace
from typing import ClassVar

import torch

from darkroom_server.core.job import Job
from darkroom_server.core.model import Guidance, ModelLimits
from darkroom_server.engine.families.packed_latents import unpack
from darkroom_server.engine.families.suspended import SuspendedFamily
from darkroom_server.engine.loading.defaults import Defaults
from darkroom_server.engine.pipelines.arguments import ArgumentSpec, Kind

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

MAX_TOKENS = 512
"""The pipeline rejects a greater ``max_sequence_length``."""

SCHNELL_TOKENS = 256
"""The length of the prompts that schnell was trained on."""


class Flux(SuspendedFamily):
    """The family of ``FluxPipeline``: dev, which takes the guidance as an input, and schnell."""

    pipeline_class = "FluxPipeline"
    components = ("transformer", "vae", "text_encoder", "text_encoder_2")
    optional = ("image_encoder", "feature_extractor")
    defaults = Defaults(steps=28, guidance_scale=3.5)
    denoiser_name = "transformer"
    convolutional = False
    half_dtype: ClassVar[torch.dtype] = torch.bfloat16
    slices_attention: ClassVar[bool] = False
    spec = TRANSFORMER
    size_multiple_factor = 2
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

    @property
    def latent_channels(self) -> int:
        """Channels of the latents: a token is a square of four latent pixels."""
        return int(self.pipeline.transformer.config.in_channels) // 4

    @property
    def default_sequence_length(self) -> int | None:
        """The ``max_sequence_length`` of a request that sets none."""
        return self.prompt_tokens

    def limits(self, max_rows: int) -> ModelLimits:
        """Half to twice the size that the model was trained at."""
        return replace(super().limits(max_rows), max_sequence_length=MAX_TOKENS)

    def vae_latents(self, stepped: torch.Tensor, job: Job) -> torch.Tensor:
        """The tokens ``stepped`` as latents."""
        return unpack(stepped, job.height // self.latent_factor, job.width // self.latent_factor)
