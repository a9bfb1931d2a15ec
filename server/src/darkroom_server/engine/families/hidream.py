"""HiDream-I1: two CLIPs, a T5 and all layers of a Llama as text encoders, a mixture of experts.

The pipeline rescales every size to one area, without a word. Here, a size is taken only if it is
what the pipeline makes of it.
"""

import math
from dataclasses import replace

from darkroom_server.core.job import PROMPT_FIELDS, Job
from darkroom_server.core.model import ModelLimits
from darkroom_server.engine.families.suspended import TransformerFamily
from darkroom_server.engine.loading.defaults import Defaults
from darkroom_server.engine.pipelines.arguments import ArgumentSpec, Kind

TRANSFORMER = ArgumentSpec(
    denoiser="HiDreamImageTransformer2DModel",
    kinds={
        "hidden_states": Kind.ROWS,
        "timesteps": Kind.TIMESTEP,
        "encoder_hidden_states_t5": Kind.ROWS,
        "encoder_hidden_states_llama3": Kind.ROWS_IN_DIM_1,
        "pooled_embeds": Kind.ROWS,
        "return_dict": Kind.EQUAL,
    },
    rows_in="hidden_states",
    signature="104431f1df307ea2",
    diffusers="0.42",
)

PROMPT_TOKENS = 128
"""The pipeline's default length of prompts."""


class HiDream(TransformerFamily):
    """The family of ``HiDreamImagePipeline``; defaults are those of HiDream-I1-Full."""

    pipeline_class = "HiDreamImagePipeline"
    components = (
        "transformer",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "text_encoder_4",
    )
    defaults = Defaults(steps=50, guidance_scale=5.0)
    spec = TRANSFORMER
    tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4")

    @property
    def optional_fields(self) -> frozenset[str]:
        """Those of ``core.model.OPTIONAL_FIELDS`` that the model takes."""
        return frozenset(
            {
                "guidance_scale",
                "negative_prompt",
                "negative_prompt_2",
                "negative_prompt_3",
                "prompt_2",
                "prompt_3",
                "max_sequence_length",
                "preview",
            }
        )

    @property
    def prompt_tokens(self) -> int:
        """Tokens that each text encoder reads of a prompt by default, the end mark included."""
        return PROMPT_TOKENS

    def texts_read(self, job: Job) -> tuple[str, ...]:
        """All prompts: each text encoder has the same limit."""
        return tuple(getattr(job, name) for name in PROMPT_FIELDS)

    def prompt_length(self, prompt: str) -> int:
        """The most tokens of ``prompt``, of all text encoders."""
        tokenizers = [getattr(self.pipeline, name) for name in self.tokenizers]
        return max(len(each(prompt, verbose=False).input_ids) for each in tokenizers)

    def limits(self, max_rows: int) -> ModelLimits:
        """The sizes that the pipeline does not rescale, with sides of 1 to 1 up to 1 to 4."""
        limits = super().limits(max_rows)
        multiple = math.lcm(2, self.denoiser.config.patch_size) * self.latent_factor
        sides = range(self.size // 2, self.size * 2 + 1, multiple)
        sizes = tuple((w, h) for w in sides for h in sides if self._rescaled(w, h) == (w, h))
        return replace(limits, size_multiple=multiple, sizes=sizes)

    def _rescaled(self, width: int, height: int) -> tuple[int, int]:
        """The size of the image that the pipeline makes if it is asked for ``width × height``."""
        side, multiple = self.latent_size * self.latent_factor, 2 * self.latent_factor
        scale = math.sqrt(side**2 / (width * height))
        return (
            int(width * scale // multiple * multiple),
            int(height * scale // multiple * multiple),
        )
