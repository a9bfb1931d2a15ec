"""Stable Diffusion XL: two CLIP text encoders, a UNet, classifier-free guidance."""

from collections.abc import Mapping
from typing import Any, ClassVar

from darkroom_server.core.job import Task
from darkroom_server.core.model import Guidance, StrengthRounding
from darkroom_server.engine.families.suspended import SuspendedFamily
from darkroom_server.engine.families.unet import UNET
from darkroom_server.engine.loading.defaults import Defaults


class StableDiffusionXL(SuspendedFamily):
    """The family of ``StableDiffusionXLPipeline``: base models, and what is distilled from them."""

    pipeline_class = "StableDiffusionXLPipeline"
    components = ("unet", "vae", "text_encoder", "text_encoder_2")
    optional = ("image_encoder", "feature_extractor")
    pipeline_options: ClassVar[Mapping[str, Any]] = {"add_watermarker": False}
    defaults = Defaults(steps=30, guidance_scale=5.0)
    denoiser_name = "unet"
    convolutional = True
    tasks: ClassVar[Mapping[Task, str]] = {
        Task.IMAGE_TO_IMAGE: "StableDiffusionXLImg2ImgPipeline",
        Task.INPAINT: "StableDiffusionXLInpaintPipeline",
    }
    strength_rounding = StrengthRounding.TAKEN
    spec = UNET

    @property
    def model_defaults(self) -> Defaults:
        """Few steps without guidance for a model distilled to them: Turbo, Lightning, LCM.

        Nothing in their folder says what they are but the scheduler: it spaces its timesteps
        trailing, as that of a fine-tune with zero signal does, which predicts velocity.
        """
        scheduler = self.pipeline.scheduler
        if type(scheduler).__name__ == "LCMScheduler":
            return Defaults(steps=4, guidance_scale=1.0)
        config = scheduler.config
        trailing = config.get("timestep_spacing") == "trailing"
        if trailing and config.get("prediction_type") == "epsilon":
            return Defaults(steps=4, guidance_scale=0.0)
        return self.defaults

    @property
    def guidance(self) -> Guidance:
        """Two rows above a scale of 1; a guidance-distilled UNet takes the scale as an input."""
        distilled = self.pipeline.unet.config.time_cond_proj_dim is not None
        return Guidance(scale=None) if distilled else Guidance()

    @property
    def optional_fields(self) -> frozenset[str]:
        """Those of ``core.model.OPTIONAL_FIELDS`` that the model takes."""
        fields = {"guidance_scale", "prompt_2", "preview"}
        if self.guidance.scale is not None:
            fields |= {
                "negative_prompt",
                "negative_prompt_2",
                "empty_negative_prompt",
                "guidance_rescale",
            }
        return frozenset(fields)
