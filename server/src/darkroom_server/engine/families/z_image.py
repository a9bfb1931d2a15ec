"""Z-Image: a Qwen3 text encoder, a transformer whose rows may differ in length and in size."""

from collections.abc import Mapping
from typing import ClassVar

from darkroom_server.core.job import Task
from darkroom_server.core.model import Guidance
from darkroom_server.engine.families.chat import chat_length
from darkroom_server.engine.families.suspended import TransformerFamily
from darkroom_server.engine.loading.defaults import Defaults
from darkroom_server.engine.pipelines.arguments import ArgumentSpec, Kind

TRANSFORMER = ArgumentSpec(
    denoiser="ZImageTransformer2DModel",
    kinds={
        "x": Kind.ROW_LIST,
        "t": Kind.TIMESTEP,
        "cap_feats": Kind.ROW_LIST,
        "return_dict": Kind.EQUAL,
    },
    rows_in="x",
    signature="9d44bd7fb8b4d2b4",
    diffusers="0.42",
    output_is_list=True,
    mixes_sizes=True,
)

TURBO_SHIFT = 3.0
"""Of Turbo's scheduler; that of the base model is 6."""

TOKEN_MULTIPLE = 32
"""The transformer pads its prompts to multiples of that many tokens."""


class ZImage(TransformerFamily):
    """The family of ``ZImagePipeline``: Z-Image, and Turbo, which is distilled from it."""

    pipeline_class = "ZImagePipeline"
    components = ("transformer", "vae", "text_encoder")
    defaults = Defaults(steps=50, guidance_scale=4.0)
    tasks: ClassVar[Mapping[Task, str]] = {
        Task.IMAGE_TO_IMAGE: "ZImageImg2ImgPipeline",
        Task.INPAINT: "ZImageInpaintPipeline",
    }
    spec = TRANSFORMER
    size_multiple_factor = 2

    @property
    def model_defaults(self) -> Defaults:
        """Eight steps without guidance for Turbo, which differs by its scheduler only."""
        if self.pipeline.scheduler.config.get("shift") == TURBO_SHIFT:
            return Defaults(steps=8, guidance_scale=0.0)
        return self.defaults

    @property
    def guidance(self) -> Guidance:
        """Two rows above a scale of 0: the prediction moves away from the unguided one."""
        return Guidance(above=0.0)

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
    def latent_size(self) -> int:
        """Width and height of the latents of an image of the size that the model was trained at."""
        return int(self.pipeline.vae.config.sample_size) // self.latent_factor

    @property
    def prompt_tokens(self) -> int:
        """Tokens that the model reads of a prompt, the chat template's included."""
        return min(512, self.most_tokens)

    @property
    def most_tokens(self) -> int:
        """Tokens that the transformer has positions for, besides the image's and the first."""
        positions = int(self.denoiser.config.axes_lens[0]) - 2
        return positions // TOKEN_MULTIPLE * TOKEN_MULTIPLE

    def prompt_length(self, prompt: str) -> int:
        """Tokens of ``prompt`` in the chat template that the pipeline puts it into."""
        return chat_length(self.pipeline.tokenizer, prompt, enable_thinking=True)
