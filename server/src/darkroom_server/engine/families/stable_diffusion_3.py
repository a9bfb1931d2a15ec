"""Stable Diffusion 3 and 3.5: two CLIP text encoders and a T5, a transformer.

The tokens of CLIP and T5 follow each other without a mask, so prompts are never padded to the
length of others. A folder may do without the T5, which is most of its weights.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from darkroom_server.core.job import Job, Task
from darkroom_server.core.model import ModelLimits
from darkroom_server.engine.families.half_dtypes import HOLDS_IN_FLOAT16
from darkroom_server.engine.families.several_prompts import is_cut
from darkroom_server.engine.families.suspended import TransformerFamily
from darkroom_server.engine.loading.defaults import Defaults
from darkroom_server.engine.pipelines.arguments import ArgumentSpec, Kind

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
