"""Models that inpaint only: their UNet takes the mask and the masked image as further channels."""

from collections.abc import Mapping
from typing import ClassVar

from darkroom_server.core.job import Task
from darkroom_server.core.strength import StrengthRounding
from darkroom_server.engine.families.stable_diffusion import StableDiffusion
from darkroom_server.engine.families.stable_diffusion_xl import StableDiffusionXL
from darkroom_server.engine.families.suspended import SuspendedFamily
from darkroom_server.engine.families.unet import UNET, UNET_CONTROLS


class StableDiffusionInpaint(SuspendedFamily):
    """The family of ``StableDiffusionInpaintPipeline``."""

    pipeline_class = "StableDiffusionInpaintPipeline"
    components = StableDiffusion.components
    optional = StableDiffusion.optional
    pipeline_options = StableDiffusion.pipeline_options
    defaults = StableDiffusion.defaults
    denoiser_name = "unet"
    convolutional = True
    own_task = Task.INPAINT
    strength_rounding = StrengthRounding.TAKEN
    spec = UNET
    takes_ip_adapter = True
    control_kind = UNET_CONTROLS

    @property
    def latent_size(self) -> int:
        """Width and height of the latents of an image of the size that the model was trained at."""
        return int(self.pipeline.unet.config.sample_size)


class StableDiffusionXLInpaint(StableDiffusionXL):
    """The family of ``StableDiffusionXLInpaintPipeline``."""

    pipeline_class = "StableDiffusionXLInpaintPipeline"
    own_task = Task.INPAINT
    tasks: ClassVar[Mapping[Task, str]] = {}

    @property
    def latent_size(self) -> int:
        """Width and height of the latents of an image of the size that the model was trained at."""
        return int(self.pipeline.unet.config.sample_size)
