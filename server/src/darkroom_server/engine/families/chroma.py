"""Chroma: a T5 text encoder, a transformer over packed latents, classifier-free guidance.

All prompts are padded to one length, with a mask that is among the rows.
"""

from collections.abc import Mapping
from typing import ClassVar

from darkroom_server.core.job import Task
from darkroom_server.core.model import Guidance
from darkroom_server.engine.families.half_dtypes import CLIPPED_IN_FLOAT16
from darkroom_server.engine.families.packed_latents import PackedLatentsFamily
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


class Chroma(PackedLatentsFamily):
    """The family of ``ChromaPipeline``."""

    pipeline_class = "ChromaPipeline"
    components = ("transformer", "vae", "text_encoder")
    optional = ("image_encoder", "feature_extractor")
    defaults = Defaults(steps=35, guidance_scale=5.0)
    # ChromaInpaintPipeline of diffusers 0.42 fails: it reads a setting that Chroma does not have.
    tasks: ClassVar[Mapping[Task, str]] = {Task.IMAGE_TO_IMAGE: "ChromaImg2ImgPipeline"}
    spec = TRANSFORMER
    half = CLIPPED_IN_FLOAT16

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
