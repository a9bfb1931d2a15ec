"""AuraFlow: a UMT5 text encoder, a transformer, classifier-free guidance.

All prompts are padded to one length. The transformer has no mask: padding is zeros to it.
"""

from dataclasses import replace

from darkroom_server.core.model import ModelLimits
from darkroom_server.engine.families.half_dtypes import HOLDS_IN_FLOAT16
from darkroom_server.engine.families.suspended import TransformerFamily
from darkroom_server.engine.loading.defaults import Defaults
from darkroom_server.engine.pipelines.arguments import ArgumentSpec, Kind

MAX_TOKENS = 256
"""The length of the prompts that the model was trained on."""

TRAINED_SIZE = 1024
"""The pipeline's default width and height, in pixels; the transformer's ``sample_size`` is less."""

TRANSFORMER = ArgumentSpec(
    denoiser="AuraFlowTransformer2DModel",
    kinds={
        "hidden_states": Kind.ROWS,
        "encoder_hidden_states": Kind.ROWS,
        "timestep": Kind.TIMESTEP,
        "return_dict": Kind.EQUAL,
    },
    rows_in="hidden_states",
    signature="e0d763a39c9a6106",
    diffusers="0.42",
)


class AuraFlow(TransformerFamily):
    """The family of ``AuraFlowPipeline``."""

    pipeline_class = "AuraFlowPipeline"
    components = ("transformer", "vae", "text_encoder")
    defaults = Defaults(steps=50, guidance_scale=3.5)
    spec = TRANSFORMER
    half = HOLDS_IN_FLOAT16
    size_multiple_factor = 2

    @property
    def optional_fields(self) -> frozenset[str]:
        """Those of ``core.model.OPTIONAL_FIELDS`` that the model takes."""
        return frozenset({"guidance_scale", "negative_prompt", "max_sequence_length", "preview"})

    @property
    def latent_size(self) -> int:
        """Width and height of the latents of an image of the size that the model was trained at."""
        return TRAINED_SIZE // self.latent_factor

    @property
    def prompt_tokens(self) -> int:
        """Tokens that the model reads of a prompt by default, the end mark included."""
        return MAX_TOKENS

    def limits(self, max_rows: int) -> ModelLimits:
        """Half to twice the size that the model was trained at, if it has the positions for it."""
        limits = super().limits(max_rows)
        config = self.pipeline.transformer.config
        positions = int(config.pos_embed_max_size**0.5)
        side = positions * config.patch_size * self.latent_factor
        return replace(limits, max_size=min(limits.max_size, side))
