"""PixArt-Sigma and PixArt-Alpha: a T5 text encoder, a transformer, classifier-free guidance.

Prompts are padded with a mask. The pipelines round sizes to a table by default, and resize the
image: here, an image has the size that the model generates.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from darkroom_server.core.job import Job
from darkroom_server.engine.families.half_dtypes import HOLDS_IN_FLOAT16
from darkroom_server.engine.families.suspended import TransformerFamily
from darkroom_server.engine.loading.defaults import Defaults
from darkroom_server.engine.pipelines.arguments import ArgumentSpec, Kind

TRANSFORMER = ArgumentSpec(
    denoiser="PixArtTransformer2DModel",
    kinds={
        "hidden_states": Kind.ROWS,
        "encoder_hidden_states": Kind.PADDED,
        "encoder_attention_mask": Kind.MASK,
        "timestep": Kind.TIMESTEP,
        "added_cond_kwargs.resolution": Kind.ROWS,
        "added_cond_kwargs.aspect_ratio": Kind.ROWS,
        "return_dict": Kind.EQUAL,
    },
    rows_in="hidden_states",
    signature="866251a922f39226",
    diffusers="0.42",
)


class PixArtSigma(TransformerFamily):
    """The family of ``PixArtSigmaPipeline``; ``max_tokens`` of a prompt were trained on."""

    pipeline_class = "PixArtSigmaPipeline"
    components = ("transformer", "vae", "text_encoder")
    defaults = Defaults(steps=20, guidance_scale=4.5)
    spec = TRANSFORMER
    half = HOLDS_IN_FLOAT16
    size_multiple_factor = 2
    max_tokens: ClassVar[int] = 300
    call_options: ClassVar[Mapping[str, Any]] = {
        "use_resolution_binning": False,
        "clean_caption": False,
    }

    @property
    def optional_fields(self) -> frozenset[str]:
        """Those of ``core.model.OPTIONAL_FIELDS`` that the model takes."""
        return frozenset({"guidance_scale", "negative_prompt", "max_sequence_length", "preview"})

    @property
    def latent_size(self) -> int:
        """Width and height of the latents of an image of the size that the model was trained at."""
        return int(self.pipeline.transformer.config.sample_size)

    @property
    def prompt_tokens(self) -> int:
        """Tokens that the model reads of a prompt by default, the end mark included."""
        return self.max_tokens

    def call_arguments(self, job: Job) -> dict[str, Any]:
        """The arguments of the pipeline's call for ``job``: its negative prompt cannot be None."""
        return {**super().call_arguments(job), "negative_prompt": job.negative_prompt}


class PixArtAlpha(PixArtSigma):
    """The family of ``PixArtAlphaPipeline``, whose larger models take the image's size too."""

    pipeline_class = "PixArtAlphaPipeline"
    max_tokens = 120
