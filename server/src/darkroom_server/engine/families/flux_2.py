"""FLUX.2: a large language model reads the prompt, a transformer works on packed latents.

Its text tokens have no mask, so prompts are never padded to the length of others. The tokens of
reference images follow those of the image.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch

from darkroom_server.core.job import Job, Task
from darkroom_server.core.model import Guidance, ModelLimits
from darkroom_server.engine.families.chat import chat_length
from darkroom_server.engine.families.half_dtypes import CLIPPED_IN_FLOAT16
from darkroom_server.engine.families.packed_latents import PackedLatentsFamily
from darkroom_server.engine.loading.defaults import Defaults
from darkroom_server.engine.pipelines.arguments import ArgumentSpec, Kind

TRANSFORMER = ArgumentSpec(
    denoiser="Flux2Transformer2DModel",
    kinds={
        "hidden_states": Kind.ROWS,
        "encoder_hidden_states": Kind.ROWS,
        "timestep": Kind.TIMESTEP,
        "guidance": Kind.ROWS,
        "img_ids": Kind.SAME,
        "txt_ids": Kind.SAME,
        "return_dict": Kind.EQUAL,
    },
    rows_in="hidden_states",
    signature="7462bba2c5d29952",
    diffusers="0.42",
)

MAX_TOKENS = 512
"""The tokens of a prompt that FLUX.2 was trained on, the chat template's included."""


MIN_REFERENCE_SIDE = 64
"""In pixels: the pipeline rejects an image with a shorter side."""


class Flux2(PackedLatentsFamily):
    """The family of ``Flux2Pipeline``: dev, which takes the guidance as an input."""

    pipeline_class = "Flux2Pipeline"
    components = ("transformer", "vae", "text_encoder")
    defaults = Defaults(steps=50, guidance_scale=4.0)
    tasks: ClassVar[Mapping[Task, str]] = {Task.EDIT: "Flux2Pipeline"}
    most_reference_images = 10
    spec = TRANSFORMER
    half = CLIPPED_IN_FLOAT16

    @property
    def guidance(self) -> Guidance:
        """None: each image takes one call for each step."""
        return Guidance(scale=None)

    @property
    def optional_fields(self) -> frozenset[str]:
        """Those of ``core.model.OPTIONAL_FIELDS`` that the model takes."""
        return frozenset({"guidance_scale", "max_sequence_length", "preview"})

    @property
    def prompt_tokens(self) -> int:
        """Tokens that the model reads of a prompt, the chat template's included."""
        return MAX_TOKENS

    def limits(self, max_rows: int) -> ModelLimits:
        """Half to twice the default size; the pipeline rejects reference images that are small."""
        return replace(super().limits(max_rows), min_reference_side=MIN_REFERENCE_SIDE)

    def prompt_length(self, prompt: str) -> int:
        """Tokens of ``prompt`` and of the pipeline's system message, in its chat template."""
        said = {"system": self.pipeline.system_message, "user": prompt}
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}]}
            for role, text in said.items()
        ]
        tokens = self.pipeline.tokenizer.apply_chat_template(
            [messages], add_generation_prompt=False, tokenize=True, return_dict=True
        )
        return len(tokens["input_ids"][0])

    def vae_latents(self, stepped: torch.Tensor, job: Job) -> torch.Tensor:
        """The tokens ``stepped`` as latents of the VAE, whose batch norm the pipeline undoes."""
        norm, config = self.pipeline.vae.bn, self.pipeline.vae.config
        std = (norm.running_var + config.batch_norm_eps).sqrt().to(stepped)
        tokens = stepped * std + norm.running_mean.to(stepped)
        return super().vae_latents(tokens, job)


class Flux2Klein(Flux2):
    """The family of ``Flux2KleinPipeline``: klein, distilled or base."""

    pipeline_class = "Flux2KleinPipeline"
    tasks: ClassVar[Mapping[Task, str]] = {Task.EDIT: "Flux2KleinPipeline"}

    @property
    def is_distilled(self) -> bool:
        """Whether the model is distilled to four steps without guidance."""
        return bool(self.pipeline.config.is_distilled)

    @property
    def model_defaults(self) -> Defaults:
        """Four steps for the distilled model."""
        return Defaults(steps=4, guidance_scale=1.0) if self.is_distilled else self.defaults

    @property
    def guidance(self) -> Guidance:
        """A second call for the empty prompt."""
        if self.is_distilled:
            return Guidance(scale=None)
        return Guidance(rows=1, calls=2)

    @property
    def optional_fields(self) -> frozenset[str]:
        """Those of ``core.model.OPTIONAL_FIELDS`` that the model takes."""
        fields = {"max_sequence_length", "preview"}
        return frozenset(fields if self.is_distilled else fields | {"guidance_scale"})

    def prompt_length(self, prompt: str) -> int:
        """Tokens of ``prompt`` in the chat template that the pipeline puts it into."""
        return chat_length(self.pipeline.tokenizer, prompt, enable_thinking=False)
