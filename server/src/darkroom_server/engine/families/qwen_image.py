"""Qwen-Image: a Qwen2.5-VL text encoder, a transformer over packed latents, a VAE of videos."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from darkroom_server.core.job import Job, Task
from darkroom_server.core.model import Guidance
from darkroom_server.engine.device.transfer import send
from darkroom_server.engine.families.half_dtypes import CLIPPED_IN_FLOAT16
from darkroom_server.engine.families.packed_latents import PackedLatentsFamily
from darkroom_server.engine.loading.defaults import Defaults
from darkroom_server.engine.pipelines.arguments import ArgumentSpec, Kind

TRANSFORMER = ArgumentSpec(
    denoiser="QwenImageTransformer2DModel",
    kinds={
        "hidden_states": Kind.ROWS,
        "timestep": Kind.TIMESTEP,
        "encoder_hidden_states": Kind.PADDED,
        "encoder_hidden_states_mask": Kind.MASK,
        "img_shapes": Kind.EQUAL_ROWS,
        "return_dict": Kind.EQUAL,
    },
    rows_in="hidden_states",
    signature="8ebcbaa0eee955af",
    diffusers="0.42",
)

DEFAULT_TOKENS, MOST_TOKENS = 512, 1024
"""The pipeline's ``max_sequence_length``, and the greatest that it does not reject."""


class QwenImage(PackedLatentsFamily):
    """The family of ``QwenImagePipeline``."""

    pipeline_class = "QwenImagePipeline"
    components = ("transformer", "vae", "text_encoder")
    defaults = Defaults(steps=50, guidance_scale=1.0, true_cfg_scale=4.0)
    has_video_vae = True
    tasks: ClassVar[Mapping[Task, str]] = {
        Task.IMAGE_TO_IMAGE: "QwenImageImg2ImgPipeline",
        Task.INPAINT: "QwenImageInpaintPipeline",
    }
    spec = TRANSFORMER
    half = CLIPPED_IN_FLOAT16

    @property
    def guidance(self) -> Guidance:
        """A second call for the negative prompt, if there is one."""
        return Guidance(scale="true_cfg_scale", needs_negative=True, rows=1, calls=2)

    @property
    def optional_fields(self) -> frozenset[str]:
        """Those of ``core.model.OPTIONAL_FIELDS`` that the model takes."""
        return frozenset(
            {
                "true_cfg_scale",
                "negative_prompt",
                "empty_negative_prompt",
                "max_sequence_length",
                "preview",
            }
        )

    @property
    def prompt_tokens(self) -> int:
        """Tokens that the model reads of a prompt by default, without its template's first."""
        return DEFAULT_TOKENS

    @property
    def most_tokens(self) -> int:
        """The greatest ``max_sequence_length``: the pipeline rejects more."""
        return MOST_TOKENS

    def call_arguments(self, job: Job) -> dict[str, Any]:
        """The arguments of the pipeline's call for ``job``.

        Without those that it ignores: it would log a warning for each image.
        """
        arguments = super().call_arguments(job)
        del arguments["guidance_scale"]
        if not self.guidance.applies_to(job):
            arguments |= {"negative_prompt": None, "true_cfg_scale": 1.0}
        return arguments

    def prompt_length(self, prompt: str) -> int:
        """Tokens of ``prompt`` in the pipeline's template, without those that it drops."""
        text = self.pipeline.prompt_template_encode.format(prompt)
        tokens = self.pipeline.tokenizer(text, verbose=False).input_ids
        return len(tokens) - int(self.pipeline.prompt_template_encode_start_idx)

    def vae_latents(self, stepped: torch.Tensor, job: Job) -> torch.Tensor:
        """The tokens ``stepped`` as latents of the VAE, whose channels the pipeline scales."""
        latents = super().vae_latents(stepped, job)
        config = self.pipeline.vae.config
        mean, std = (
            send(torch.tensor(values, dtype=latents.dtype), latents.device).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return latents * std + mean
