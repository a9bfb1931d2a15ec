"""FLUX.1 and FLUX.1 Kontext: a CLIP and a T5 text encoder, a transformer over packed latents.

Its text tokens have no mask, so prompts are never padded to the length of others.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from darkroom_server.core.job import Job, Task
from darkroom_server.core.model import Guidance
from darkroom_server.engine.families.half_dtypes import CLIPPED_IN_FLOAT16
from darkroom_server.engine.families.packed_latents import PackedLatentsFamily
from darkroom_server.engine.families.several_prompts import is_cut
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

    def call_arguments(self, job: Job) -> dict[str, Any]:
        """The arguments of the pipeline's call for ``job``.

        With the area of ``job``: the pipeline rescales each size to the one that it is given.
        """
        return super().call_arguments(job) | {"max_area": job.width * job.height}
