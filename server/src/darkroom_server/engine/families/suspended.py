"""Families whose samples are suspended runs of diffusers' own pipeline."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import structlog
import torch

from darkroom_server.core.engine_config import EngineConfig
from darkroom_server.core.errors import StartupError
from darkroom_server.core.job import ImageFormat, Job, SchedulerName, Task
from darkroom_server.core.model import ModelInfo, ModelLimits, SchedulerOffer
from darkroom_server.engine.components.decoder import Decoder
from darkroom_server.engine.components.previewer import Previewer
from darkroom_server.engine.components.safety_checker import SafetyChecker
from darkroom_server.engine.components.scheduler_table import (
    DIFFUSION_SCHEDULERS,
    FLOW_MATCH_SCHEDULERS,
)
from darkroom_server.engine.components.schedulers import config_of, make_scheduler, name_of, offer
from darkroom_server.engine.conditioning.image_encoder import ImageEncoder
from darkroom_server.engine.conditioning.input_images import image_arguments, noise_image
from darkroom_server.engine.conditioning.ip_adapter import image_prompt
from darkroom_server.engine.conditioning.task_pipelines import made_of
from darkroom_server.engine.families.base import Family, Precision
from darkroom_server.engine.families.half_dtypes import NOT_KNOWN_TO_HOLD
from darkroom_server.engine.loading.vocabulary import has_vocabulary
from darkroom_server.engine.pipelines.arguments import ArgumentSpec, signature_of
from darkroom_server.engine.pipelines.calls import DenoiserCall
from darkroom_server.engine.pipelines.encode_memo import EncodeMemo
from darkroom_server.engine.pipelines.hosted_pipeline import HostedPipeline
from darkroom_server.engine.pipelines.hosted_scheduler import hosted_scheduler
from darkroom_server.engine.pipelines.model import SuspendedModel
from darkroom_server.engine.pipelines.runs import Runs, global_generators
from darkroom_server.engine.warmup.formats import MemoryFormat
from darkroom_server.engine.warmup.placement import vae_is_upcast

log = structlog.get_logger(__name__)

LARGE_ENCODERS = 10**9
"""Weights of all text encoders from which on an encode takes as long as batches."""

PROBE_PROMPT = "a photograph of a tree"


class SuspendedFamily(Family):
    """A family that diffusers runs itself; a subclass describes its pipeline.

    ``spec`` merges the denoiser's calls. ``size_multiple_factor``: sizes are multiples of that many
    latent pixels. ``call_options`` are further arguments of each call. ``own_components`` have
    state, so each sample has a copy of them. ``prompt_tokenizer`` cuts prompts that are too long.
    ``has_video_vae``: an image is a video of one frame for the VAE.
    """

    spec: ClassVar[ArgumentSpec]
    size_multiple_factor: ClassVar[int] = 1
    call_options: ClassVar[Mapping[str, Any]] = {}
    own_components: ClassVar[tuple[str, ...]] = ()
    prompt_tokenizer: str = "tokenizer"
    has_previews: ClassVar[bool] = True
    has_video_vae: ClassVar[bool] = False

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        self._call_parameters = {
            task: frozenset(inspect.signature(each.__call__).parameters)
            for task, each in self.task_classes.items()
        }
        self._name = ""
        self._runs: Runs
        self._probe: dict[str, Any]
        self._probe_latents: torch.Tensor
        self._bytes_per_sample = 0

    @classmethod
    def check_folder(cls, folder: Path, name: str) -> None:
        """Check each tokenizer: without a vocabulary, transformers makes an empty one.

        Raises ``StartupError``.
        """
        for tokenizer in sorted(folder.glob("tokenizer*")):
            if tokenizer.is_dir() and not has_vocabulary(tokenizer):
                raise StartupError(
                    f"model {name!r} has no vocabulary in its {tokenizer.name}; copy or download "
                    "it again"
                )

    def check_pipeline(self, name: str) -> None:
        """Raise ``StartupError`` if the scheduler adds noise that no seed repeats."""
        self._name = name
        if self.pipeline.scheduler.config.get("stochastic_sampling"):
            raise StartupError(
                f"model {name!r}: its scheduler has stochastic_sampling, which adds noise that no "
                "seed repeats; set it to false in the folder's scheduler_config.json"
            )

    @property
    def latent_factor(self) -> int:
        """Pixels of an image for one pixel of its latents, on each side."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def latent_size(self) -> int:
        """Width and height of the latents of an image of the size that the model was trained at."""
        return int(self.pipeline.default_sample_size)

    @property
    def prompt_tokens(self) -> int:
        """Tokens that the model reads of a prompt, the start and end marks included."""
        return int(getattr(self.pipeline, self.prompt_tokenizer).model_max_length)

    @property
    def default_sequence_length(self) -> int | None:
        """The ``max_sequence_length`` of a request that sets none, None if it is not taken."""
        return self.prompt_tokens if "max_sequence_length" in self.optional_fields else None

    @property
    def most_tokens(self) -> int:
        """The greatest ``max_sequence_length``, if it is taken."""
        return self.prompt_tokens

    @property
    def unbatched_reason(self) -> str:
        """Why denoiser calls are not merged, empty if they are."""
        found = signature_of(type(self.denoiser))
        if found == self.spec.signature:
            return ""
        return (
            f"{type(self.denoiser).__name__} has other arguments than in diffusers "
            f"{self.spec.diffusers}"
        )

    @property
    def scheduler_offers(self) -> tuple[SchedulerOffer, ...]:
        """The schedulers that the pipeline takes, and that fit what the model predicts."""
        config = config_of(self.pipeline.scheduler)
        return tuple(offer(name, config) for name in self._runs.schedulers)

    @property
    def bytes_per_sample(self) -> int:
        """What an unfinished image of the default size holds between its batches, in bytes."""
        return self._bytes_per_sample

    def limits(self, max_rows: int) -> ModelLimits:
        """Half to twice the size that the model was trained at; outside, images fall apart."""
        multiple = self.latent_factor * self.size_multiple_factor
        return ModelLimits(
            min_size=max(multiple, self.size // 2 // multiple * multiple),
            max_size=self.size * 2,
            size_multiple=multiple,
            prompt_tokens=self.prompt_tokens,
            max_rows=max_rows,
            max_sequence_length=0 if self.default_sequence_length is None else self.most_tokens,
        )

    def prepare(
        self, memory_format: MemoryFormat, precision: Precision, config: EngineConfig
    ) -> None:
        """Share the pipeline's modules, and run it once to see what its calls look like."""
        reason = self.unbatched_reason
        if reason:
            log.warning("denoiser calls are not batched", why=reason)
        device = self.denoiser.device
        host = HostedPipeline(
            self.pipeline,
            (self.denoiser_name,),
            self.vae,
            device,
            EncodeMemo(config.prompt_cache_bytes, device),
            weighted_encoding=self.weighted_encoding(memory_format, precision),
        )
        own_config = config_of(self.pipeline.scheduler)
        hosts = {self.own_task: host}
        for task, pipeline_class in self.task_classes.items():
            if pipeline_class is type(self.pipeline):
                hosts[task] = host
            else:
                hosts[task] = host.sharing(made_of(self.pipeline, pipeline_class))
        self._runs = Runs(
            hosts=hosts,
            images=ImageEncoder(
                self.vae, nullcontext if vae_is_upcast(self.pipeline) else precision
            ),
            spec=None if reason else self._spec(memory_format),
            arguments_of=self.call_arguments,
            vae_latents=self.vae_latents,
            schedulers={
                SchedulerName.MODEL: hosted_scheduler(
                    make_scheduler(SchedulerName.MODEL, own_config)
                )
            },
            own={name: getattr(self.pipeline, name) for name in self.own_components},
            precision=precision,
            ip_adapter=self.ip_adapter,
        )
        self._offer_schedulers(own_config, self._run_probe())

    def weighted_encoding(
        self, memory_format: MemoryFormat, precision: Precision
    ) -> Callable[..., Any] | None:
        """What encodes weighted prompts in place of the pipeline, None if the model takes none."""
        return None

    def denoiser_inputs(
        self, rows: int, dtype: torch.dtype, device: torch.device, layout: torch.memory_format
    ) -> dict[str, Any]:
        """Keyword arguments of one denoiser call of ``rows`` images of the default size."""
        return self.spec.collate([self._probe] * rows)

    def latents(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Latents of one image of the default size, as the VAE takes them."""
        return self._probe_latents

    def encode_prompt(self) -> bool:
        """Encode a prompt past the cache, for measurements."""
        scale = self.model_defaults.guidance_scale
        job = self._probe_job(SchedulerName.MODEL)
        # Another prompt than the probe's, which is cached.
        return self._runs.encode_once(
            replace(job, prompt="a photograph of a house", guidance_scale=scale)
        )

    def vae_latents(self, stepped: torch.Tensor, job: Job) -> torch.Tensor:
        """``stepped``, what the scheduler steps for an image of ``job``, as [1, channels, h, w].

        The previewer takes them with the scale and the shift of what the scheduler steps.
        """
        return stepped

    def call_arguments(self, job: Job) -> dict[str, Any]:
        """The arguments of the pipeline's call for ``job``, without those it does not have."""
        negative = job.negative_prompt if job.has_negative_prompt else None
        asked = {
            "prompt": job.prompt,
            "prompt_2": job.prompt_2 or None,
            "prompt_3": job.prompt_3 or None,
            "negative_prompt": negative,
            "negative_prompt_2": job.negative_prompt_2 or None,
            "negative_prompt_3": job.negative_prompt_3 or None,
            "width": job.width,
            "height": job.height,
            "num_inference_steps": job.steps,
            "guidance_scale": job.guidance_scale,
            "guidance_rescale": job.guidance_rescale,
            "true_cfg_scale": job.true_cfg_scale,
            "max_sequence_length": job.max_sequence_length,
            "output_type": "pt",
            "return_dict": False,
            **image_arguments(job),
            **image_prompt(self.ip_adapter, job, self.guidance),
            **self.call_options,
        }
        taken = self._call_parameters[job.task]
        return {
            name: value
            for name, value in asked.items()
            if name in taken and not (value is None and name.startswith("max_"))
        }

    def is_truncated(self, job: Job) -> bool:
        """Whether the model does not read a prompt of ``job`` to its end."""
        limit = job.max_sequence_length or self.prompt_tokens
        return any(self.prompt_length(text) > limit for text in self.texts_read(job) if text)

    def texts_read(self, job: Job) -> tuple[str, ...]:
        """The texts of ``job`` that ``prompt_tokens`` limits, as the model reads them."""
        return (job.prompt, job.negative_prompt)

    def prompt_length(self, prompt: str) -> int:
        """Tokens of ``prompt``, counted as the pipeline does for its ``max_sequence_length``."""
        tokenizer = getattr(self.pipeline, self.prompt_tokenizer)
        return len(tokenizer(prompt, verbose=False).input_ids)

    def new_model(
        self,
        info: ModelInfo,
        memory_format: MemoryFormat,
        device: torch.device,
        precision: Precision,
        decoder: Decoder,
        safety: SafetyChecker | None,
    ) -> SuspendedModel:
        """The model to serve; its pipeline is on ``device``, in ``memory_format``, and measured."""
        previewer = (
            Previewer(self.vae, decoder.precision, self.latent_factor, video=self.has_video_vae)
            if self.has_previews
            else None
        )
        return SuspendedModel(
            info=info,
            runs=replace(
                self._runs, adapters=self.adapters, controls=self.controls, forms=self.forms
            ),
            is_truncated=self.is_truncated,
            decoder=decoder,
            previewer=previewer,
            safety=safety,
            encodes_slowly=self._encoder_weights() >= LARGE_ENCODERS,
        )

    def _encoder_weights(self) -> int:
        """The number of weights of all text encoders."""
        encoders = [name for name in self.components if name.startswith("text_encoder")]
        modules = [getattr(self.pipeline, name, None) for name in encoders]
        return sum(w.numel() for module in modules if module for w in module.parameters())

    def _spec(self, memory_format: MemoryFormat) -> ArgumentSpec:
        layout = memory_format.layout if self.convolutional else torch.contiguous_format
        return replace(self.spec, layout=layout)

    def _offer_schedulers(self, config: dict[str, Any], output: Any) -> None:
        """Offer the schedulers with which the pipeline runs, and whose images a seed repeats.

        ``output`` is the denoiser's for the first step of an image.
        """
        flow = config.get("prediction_type", "flow_prediction") == "flow_prediction"
        names = FLOW_MATCH_SCHEDULERS if flow else DIFFUSION_SCHEDULERS
        # The model's own has a name too, and may be meant for other kinds of models as well.
        for name in dict.fromkeys((name_of(self.pipeline.scheduler), *names)):
            if name is SchedulerName.MODEL:
                continue
            self._runs.schedulers[name] = hosted_scheduler(make_scheduler(name, config))
            job = self._probe_job(name)
            reason = self._runs.why_unusable(job, output, self.guidance.calls_per_step(job))
            if reason:
                log.debug("scheduler is not offered", scheduler=name, why=reason)
                del self._runs.schedulers[name]

    def _probe_job(self, scheduler: SchedulerName) -> Job:
        """An image of the default size without guidance, so of one row."""
        inpaints = self.own_task is Task.INPAINT
        edits = self.own_task is Task.EDIT
        return Job(
            id="warm-up",
            model="",
            prompt=PROBE_PROMPT,
            negative_prompt="",
            width=self.size,
            height=self.size,
            steps=4,
            guidance_scale=self._unguided_scale,
            seed=0,
            image_count=1,
            scheduler=scheduler,
            format=ImageFormat.RAW_RGB,
            quality=90,
            exact=False,
            submitted_at=0.0,
            image=noise_image(self.size, channels=3) if inpaints else None,
            mask_image=noise_image(self.size, channels=1) if inpaints else None,
            reference_images=(noise_image(self.size, channels=3),) if edits else (),
        )

    @property
    def _unguided_scale(self) -> float:
        turns_guidance_on = self.guidance.scale == "guidance_scale"
        return self.guidance.above if turns_guidance_on else self.defaults.guidance_scale

    def _run_probe(self) -> Any:
        """Keep an image's first denoiser call, and the latents of its decode.

        Returns what the denoiser returned. Raises ``StartupError`` if the model's own scheduler
        takes noise that no seed repeats.
        """
        job = self._probe_job(SchedulerName.MODEL)
        steps = self.guidance.calls_per_step(job) * job.steps
        sample, _ = self._runs.start(job, 0, steps=steps)
        assert isinstance(sample.pending, DenoiserCall)
        self._probe = dict(sample.pending.arguments)
        output = self._runs.call_denoiser(self.denoiser, self.spec.alone(self._probe))
        before = global_generators(self.denoiser.device)
        while not sample.done:
            self._bytes_per_sample = max(self._bytes_per_sample, sample.held_bytes())
            # The same output for each step: what is decoded need not be a picture.
            sample.advance(output)
        if not torch.equal(before, global_generators(self.denoiser.device)):
            sample.close()
            raise StartupError(
                f"model {self._name!r}: its {type(sample.scheduler).__name__} takes noise from the "
                "global generator, which no seed repeats; give its folder another scheduler"
            )
        self._probe_latents = sample.latents
        sample.close()
        return output


class TransformerFamily(SuspendedFamily):
    """A family whose denoiser is a transformer."""

    denoiser_name = "transformer"
    convolutional = False
    half = NOT_KNOWN_TO_HOLD
