"""Sana: a linear transformer on latents of a 32nd of the size, with Gemma as text encoder."""

from collections.abc import Mapping
from typing import Any, ClassVar

from darkroom_server.core.job import Job
from darkroom_server.core.model import Guidance
from darkroom_server.engine.families.half_dtypes import LINEAR_ATTENTION
from darkroom_server.engine.families.suspended import TransformerFamily
from darkroom_server.engine.loading.defaults import Defaults
from darkroom_server.engine.pipelines.arguments import ArgumentSpec, Kind

TRANSFORMER = ArgumentSpec(
    denoiser="SanaTransformer2DModel",
    kinds={
        "hidden_states": Kind.ROWS,
        "encoder_hidden_states": Kind.PADDED,
        "encoder_attention_mask": Kind.MASK,
        "timestep": Kind.TIMESTEP,
        "guidance": Kind.ROWS,
        "return_dict": Kind.EQUAL,
    },
    rows_in="hidden_states",
    signature="ceeb230823b1e810",
    diffusers="0.42",
)

PROMPT_TOKENS = 300
"""Tokens of a prompt, after the instruction that the pipeline puts before it."""


class Sana(TransformerFamily):
    """The family of ``SanaPipeline``.

    Images are generated at the size that is asked for: the pipeline's resolution binning, which
    resizes an image of another size, is off.
    """

    pipeline_class = "SanaPipeline"
    components = ("transformer", "vae", "text_encoder")
    defaults = Defaults(steps=20, guidance_scale=4.5)
    spec = TRANSFORMER
    half = LINEAR_ATTENTION
    call_options: ClassVar[Mapping[str, Any]] = {"use_resolution_binning": False}
    # The previewer reads the mean of a VAE's distribution, and this one has none.
    has_previews = False

    @property
    def latent_size(self) -> int:
        """Width and height of the latents of an image of the default size."""
        return int(self.denoiser.config.sample_size)

    @property
    def prompt_tokens(self) -> int:
        """Tokens that the model reads of a prompt, the start and end marks included."""
        return PROMPT_TOKENS

    @property
    def optional_fields(self) -> frozenset[str]:
        """Those of ``core.model.OPTIONAL_FIELDS`` that the model takes."""
        return frozenset({"negative_prompt", "guidance_scale", "max_sequence_length"})

    def call_arguments(self, job: Job) -> dict[str, Any]:
        """The arguments of the pipeline's call for ``job``, without those it does not have.

        This pipeline's own negative prompt is "", and it does not take None.
        """
        return {**super().call_arguments(job), "negative_prompt": job.negative_prompt}


class SanaSprint(Sana):
    """The family of ``SanaSprintPipeline``: distilled to a few steps, with guidance as an input."""

    pipeline_class = "SanaSprintPipeline"
    defaults = Defaults(steps=2, guidance_scale=4.5)

    @property
    def guidance(self) -> Guidance:
        """The denoiser takes the guidance scale as an input."""
        return Guidance(scale=None)

    @property
    def optional_fields(self) -> frozenset[str]:
        """Those of ``core.model.OPTIONAL_FIELDS`` that the model takes."""
        return frozenset({"guidance_scale", "max_sequence_length"})

    def call_arguments(self, job: Job) -> dict[str, Any]:
        """The arguments of the pipeline's call for ``job``, without those it does not have."""
        arguments = {k: v for k, v in super().call_arguments(job).items() if k != "negative_prompt"}
        if job.steps != 2:
            # The pipeline's default is for two steps, and it rejects other numbers of them with it.
            arguments["intermediate_timesteps"] = None
        return arguments
