"""Lumina-Image 2.0: a Gemma 2 text encoder, a transformer that masks the end of its prompts."""

from darkroom_server.core.job import Job
from darkroom_server.core.model import Guidance
from darkroom_server.engine.families.suspended import TransformerFamily
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


class Lumina2(TransformerFamily):
    """The family of ``Lumina2Pipeline``."""

    pipeline_class = "Lumina2Pipeline"
    components = ("transformer", "vae", "text_encoder")
    defaults = Defaults(steps=30, guidance_scale=4.0)
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
        return min(256, self.most_tokens)

    @property
    def most_tokens(self) -> int:
        """Tokens that the transformer has positions for, besides the image's."""
        return int(self.denoiser.config.axes_lens[0]) - 1

    def texts_read(self, job: Job) -> tuple[str, ...]:
        """The prompt as the pipeline joins it; the negative prompt has no system prompt."""
        return (f"{self.pipeline.system_prompt} <Prompt Start> {job.prompt}", job.negative_prompt)
