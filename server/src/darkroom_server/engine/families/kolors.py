"""Kolors: the UNet of Stable Diffusion XL, with ChatGLM as text encoder.

All prompts are padded to one length.
"""

from typing import Any

from darkroom_server.core.job import Job
from darkroom_server.engine.families.suspended import SuspendedFamily
from darkroom_server.engine.families.unet import UNET
from darkroom_server.engine.loading.defaults import Defaults

PROMPT_TOKENS = 256
"""The pipeline pads prompts to this length, whatever its ``max_sequence_length``."""


class Kolors(SuspendedFamily):
    """The family of ``KolorsPipeline``."""

    pipeline_class = "KolorsPipeline"
    components = ("unet", "vae", "text_encoder")
    optional = ("image_encoder", "feature_extractor")
    defaults = Defaults(steps=50, guidance_scale=5.0)
    denoiser_name = "unet"
    convolutional = True
    spec = UNET

    @property
    def prompt_tokens(self) -> int:
        """Tokens that the model reads of a prompt, the start marks included."""
        return PROMPT_TOKENS

    def call_arguments(self, job: Job) -> dict[str, Any]:
        """The arguments of the pipeline's call for ``job``, without those it does not have.

        Without a negative prompt, the pipeline encodes "". It fails on None if its folder sets
        ``force_zeros_for_empty_prompt``, so it is given "".
        """
        return {**super().call_arguments(job), "negative_prompt": job.negative_prompt}
