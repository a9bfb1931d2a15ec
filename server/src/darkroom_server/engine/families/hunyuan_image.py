"""HunyuanImage 2.1: Qwen2.5-VL and ByT5 as text encoders, and guidance by an object with state."""

from typing import Any

from darkroom_server.core.job import Job
from darkroom_server.core.model import Guidance
from darkroom_server.engine.families.suspended import TransformerFamily
from darkroom_server.engine.loading.defaults import Defaults
from darkroom_server.engine.pipelines.arguments import ArgumentSpec, Kind

TRANSFORMER = ArgumentSpec(
    denoiser="HunyuanImageTransformer2DModel",
    kinds={
        "hidden_states": Kind.ROWS,
        "timestep": Kind.TIMESTEP,
        "timestep_r": Kind.TIMESTEP,
        "encoder_hidden_states": Kind.ROWS,
        "encoder_attention_mask": Kind.ROWS,
        "encoder_hidden_states_2": Kind.ROWS,
        "encoder_attention_mask_2": Kind.ROWS,
        "guidance": Kind.ROWS,
        "return_dict": Kind.EQUAL,
    },
    rows_in="hidden_states",
    signature="d3cdb362601dd66a",
    diffusers="0.42",
)


class HunyuanImage(TransformerFamily):
    """The family of ``HunyuanImagePipeline``: the base model, and what is distilled from it.

    The base model's guidance scale is that of the guider in its folder. A guider remembers earlier
    steps, so each sample has its own.
    """

    pipeline_class = "HunyuanImagePipeline"
    components = ("transformer", "vae", "text_encoder", "text_encoder_2")
    defaults = Defaults(steps=50, guidance_scale=3.5)
    spec = TRANSFORMER
    own_components = ("guider", "ocr_guider")
    has_previews = False

    @property
    def model_defaults(self) -> Defaults:
        """Those of the pipeline; a distilled model's guidance is an input of its denoiser."""
        if self._is_distilled:
            return Defaults(steps=8, guidance_scale=3.25)
        return self.defaults

    @property
    def prompt_tokens(self) -> int:
        """Tokens that the model reads of a prompt."""
        return int(self.pipeline.tokenizer_max_length)

    @property
    def guidance(self) -> Guidance:
        """A second call for each step if the folder has a guider that is on."""
        if self.pipeline.guider is None or self.pipeline.guider.num_conditions == 1:
            return Guidance(scale=None)
        return Guidance(above=-1.0, rows=1, calls=2)

    @property
    def optional_fields(self) -> frozenset[str]:
        """Those of ``core.model.OPTIONAL_FIELDS`` that the model takes."""
        fields = {"guidance_scale"} if self._is_distilled else set()
        if self.guidance.scale is not None:
            fields.add("negative_prompt")
        return frozenset(fields)

    def call_arguments(self, job: Job) -> dict[str, Any]:
        """The arguments of the pipeline's call for ``job``, without those it does not have."""
        scale = {"distilled_guidance_scale": job.guidance_scale} if self._is_distilled else {}
        return {**super().call_arguments(job), **scale}

    @property
    def _unguided_scale(self) -> float:
        """No request turns a guider off."""
        return self.model_defaults.guidance_scale

    @property
    def _is_distilled(self) -> bool:
        return bool(self.denoiser.config.guidance_embeds)
