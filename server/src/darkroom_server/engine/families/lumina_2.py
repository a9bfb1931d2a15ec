"""Lumina-Image 2.0: a Gemma 2 text encoder, a transformer that masks the end of its prompts."""

from dataclasses import replace
from typing import ClassVar

import torch

from darkroom_server.core.job import Job
from darkroom_server.core.model import Guidance, ModelLimits
from darkroom_server.engine.families.suspended import SuspendedFamily
from darkroom_server.engine.loading.defaults import Defaults
from darkroom_server.engine.pipelines.arguments import ArgumentSpec, Kind

TRANSFORMER = ArgumentSpec(
    denoiser="Lumina2Transformer2DModel",
    kinds={
        "hidden_states": Kind.ROWS,
        "timestep": Kind.TIMESTEP,
        "encoder_hidden_states": Kind.PADDED,
        "encoder_attention_mask": Kind.MASK,
        "return_dict": Kind.EQUAL,
    },
    rows_in="hidden_states",
    signature="e45a6eb338bf5fb4",
    diffusers="0.42",
)


class Lumina2(SuspendedFamily):
    """The family of ``Lumina2Pipeline``."""

    pipeline_class = "Lumina2Pipeline"
    components = ("transformer", "vae", "text_encoder")
    defaults = Defaults(steps=30, guidance_scale=4.0)
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
        return frozenset(
            {
                "negative_prompt",
                "empty_negative_prompt",
                "guidance_scale",
                "max_sequence_length",
                "preview",
            }
        )

    @property
    def prompt_tokens(self) -> int:
        """Tokens that the model reads of a prompt by default, the system prompt included."""
        return min(256, self._most_tokens)

    @property
    def default_sequence_length(self) -> int:
        """The ``max_sequence_length`` of a request that sets none."""
        return self.prompt_tokens

    @property
    def _most_tokens(self) -> int:
        """Tokens that the transformer has positions for, besides the image's."""
        return int(self.denoiser.config.axes_lens[0]) - 1

    def limits(self, max_rows: int) -> ModelLimits:
        """The bounds of a request, with the row limit that was measured."""
        return replace(super().limits(max_rows), max_sequence_length=self._most_tokens)

    def is_truncated(self, job: Job) -> bool:
        """Whether the model does not read a prompt of ``job`` to its end."""
        # As the pipeline joins them; the negative prompt has no system prompt.
        read = f"{self.pipeline.system_prompt} <Prompt Start> {job.prompt}"
        limit = job.max_sequence_length or self.prompt_tokens
        return any(self.prompt_length(text) > limit for text in (read, job.negative_prompt) if text)
