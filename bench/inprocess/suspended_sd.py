"""Stable Diffusion 1.x and 2.x as suspended runs of diffusers' pipeline; not served.

The server has a loop of its own for this family. This form is for comparisons with it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from darkroom_server.engine.families.registry import FAMILIES
from darkroom_server.engine.families.stable_diffusion import StableDiffusion
from darkroom_server.engine.families.suspended import SuspendedFamily
from darkroom_server.engine.families.unet import UNET


class SuspendedStableDiffusion(SuspendedFamily):
    """The family of ``StableDiffusionPipeline``, whose UNet has the arguments of SDXL's."""

    pipeline_class = StableDiffusion.pipeline_class
    components = StableDiffusion.components
    optional = StableDiffusion.optional
    pipeline_options = StableDiffusion.pipeline_options
    defaults = StableDiffusion.defaults
    denoiser_name = "unet"
    convolutional = True
    spec = UNET

    @property
    def latent_size(self) -> int:
        """Width and height of the latents of an image of the size that the model was trained at."""
        return int(self.pipeline.unet.config.sample_size)


@contextmanager
def suspended_stable_diffusion() -> Iterator[None]:
    """Models that are loaded meanwhile are of this family."""
    kind = SuspendedStableDiffusion.pipeline_class
    with mock.patch.dict(FAMILIES, {kind: SuspendedStableDiffusion}):
        yield
