"""Chroma: a T5 text encoder, a transformer over packed latents, classifier-free guidance.

All prompts are padded to one length, with a mask that is among the rows.
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

MAX_TOKENS = 512
"""The pipeline rejects a greater ``max_sequence_length``."""

TRANSFORMER = ArgumentSpec(
    denoiser="ChromaTransformer2DModel",
    kinds={
        "hidden_states": Kind.ROWS,
        "encoder_hidden_states": Kind.ROWS,
        # Of the tokens of the prompt and, after them, of the image: not padded at its end.
        "attention_mask": Kind.ROWS,
        "timestep": Kind.TIMESTEP,
        "img_ids": Kind.SAME,
        "txt_ids": Kind.SAME,
        "return_dict": Kind.EQUAL,
    },
    rows_in="hidden_states",
    signature="c5ec5ddb31e829a3",
    diffusers="0.42",
)


class Chroma(SuspendedFamily):
    """The family of ``ChromaPipeline``."""

    pipeline_class = "ChromaPipeline"
    components = ("transformer", "vae", "text_encoder")
    optional = ("image_encoder", "feature_extractor")
    defaults = Defaults(steps=35, guidance_scale=5.0)
    denoiser_name = "transformer"
    convolutional = False
    half_dtype: ClassVar[torch.dtype] = torch.bfloat16
    slices_attention: ClassVar[bool] = False
    spec = TRANSFORMER
    size_multiple_factor = 2

    @property
    def guidance(self) -> Guidance:
        """A second call for the negative prompt, which may be empty."""
        return Guidance(rows=1, calls=2)

    @property
    def optional_fields(self) -> frozenset[str]:
        """Those of ``core.model.OPTIONAL_FIELDS`` that the model takes."""
        return frozenset({"guidance_scale", "negative_prompt", "max_sequence_length", "preview"})

    @property
    def prompt_tokens(self) -> int:
        """Tokens that the model reads of a prompt by default, the end mark included."""
        return MAX_TOKENS

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
