"""Stable Diffusion XL: two CLIP text encoders, a UNet, classifier-free guidance."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from darkroom_server.core.job import Job, PromptSyntax, Task
from darkroom_server.core.model import Guidance
from darkroom_server.core.strength import StrengthRounding
from darkroom_server.engine.components.weighted_prompts import (
    WeightedPromptEncoder,
    compel_is_installed,
)
from darkroom_server.engine.families.base import Precision
from darkroom_server.engine.families.several_prompts import is_cut
from darkroom_server.engine.families.suspended import SuspendedFamily
from darkroom_server.engine.families.unet import UNET, UNET_CONTROLS
from darkroom_server.engine.loading.defaults import Defaults
from darkroom_server.engine.warmup.formats import MemoryFormat


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
    takes_ip_adapter = True
    control_kind = UNET_CONTROLS

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
        """Those of ``core.model.OPTIONAL_FIELDS`` that it takes if their extra is installed."""
        fields = {"guidance_scale", "prompt_2", "prompt_syntax", "preview"}
        if self.guidance.scale is not None:
            fields |= {
                "negative_prompt",
                "negative_prompt_2",
                "empty_negative_prompt",
                "guidance_rescale",
            }
        return frozenset(fields)

    def is_truncated(self, job: Job) -> bool:
        """Whether no text encoder reads a prompt of ``job`` to its end; weighted ones are split."""
        windows = dict.fromkeys(("tokenizer", "tokenizer_2"), self.prompt_tokens)
        return job.prompt_syntax is PromptSyntax.PLAIN and is_cut(job, self.pipeline, windows)

    def weighted_encoding(
        self, memory_format: MemoryFormat, precision: Precision
    ) -> "WeightedEncoding | None":
        """What encodes weighted prompts in place of the pipeline, None without the extra."""
        if not compel_is_installed():
            return None
        pipeline = self.pipeline
        encoder = WeightedPromptEncoder(
            (pipeline.tokenizer, pipeline.tokenizer_2),
            (pipeline.text_encoder, pipeline.text_encoder_2),
            memory_format.dtype,
            precision,
            sdxl=True,
        )
        return WeightedEncoding(encoder, bool(pipeline.config.force_zeros_for_empty_prompt))


@dataclass(frozen=True, slots=True)
class WeightedEncoding:
    """Encodes weighted prompts as the pipeline's ``encode_prompt`` encodes plain ones.

    ``zeros_for_none``: without a negative prompt its embeddings are zeros, else those of "".
    """

    encoder: WeightedPromptEncoder
    zeros_for_none: bool

    def __call__(
        self,
        *,
        prompt: str,
        prompt_2: str | None,
        negative_prompt: str | None,
        negative_prompt_2: str | None,
        do_classifier_free_guidance: bool,
        **_: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        """The embeddings of the prompt and the negative prompt, then their pooled ones.

        The other arguments of ``encode_prompt`` are the same for each image.
        """
        row = self.encoder.encode(prompt, prompt_2 or prompt)
        assert row.pooled is not None
        if not do_classifier_free_guidance:
            return row.hidden, None, row.pooled, None
        if negative_prompt is None and self.zeros_for_none:
            zeros = torch.zeros_like(row.hidden), torch.zeros_like(row.pooled)
            return row.hidden, zeros[0], row.pooled, zeros[1]
        negative_text = negative_prompt or ""
        negative = self.encoder.encode(negative_text, negative_prompt_2 or negative_text)
        row, negative = self.encoder.padded(row, negative)
        return row.hidden, negative.hidden, row.pooled, negative.pooled
