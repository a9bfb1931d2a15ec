"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet, classifier-free guidance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from darkroom_server.core.engine_config import EngineConfig
from darkroom_server.core.errors import Failure, StartupError
from darkroom_server.core.events import Counted
from darkroom_server.core.job import Job, PromptSyntax, Task
from darkroom_server.core.model import ModelInfo, ModelLimits
from darkroom_server.core.strength import StrengthRounding
from darkroom_server.engine.adapters.model_adapters import (
    ModelAdapters,
    denoising,
    encoder_mix,
    group_key,
)
from darkroom_server.engine.components.attention import SlicedAttention
from darkroom_server.engine.components.decoder import Decoder
from darkroom_server.engine.components.embedding import Embedding
from darkroom_server.engine.components.previewer import Previewer
from darkroom_server.engine.components.prompt_encoder import PromptEncoder, PromptKey
from darkroom_server.engine.components.prompt_projections import (
    PromptProjections,
    bytes_per_prompt,
    keeping,
)
from darkroom_server.engine.components.safety_checker import SafetyChecker
from darkroom_server.engine.components.schedulers import config_of
from darkroom_server.engine.components.shared_rows import SharedRows, sharing
from darkroom_server.engine.components.weighted_prompts import (
    WeightedPromptEncoder,
    compel_is_installed,
)
from darkroom_server.engine.conditioning.ip_adapter import (
    IpAdapter,
    no_image_arguments,
    row_scales,
)
from darkroom_server.engine.controls.model_controls import ModelControls, controlled, controls_of
from darkroom_server.engine.counters import Counts
from darkroom_server.engine.families.base import Embeddings, Family, Precision
from darkroom_server.engine.families.image_runs import image_runs_of
from darkroom_server.engine.families.unet import UNET_CONTROLS
from darkroom_server.engine.forms.denoiser_forms import DenoiserForms, run_denoiser
from darkroom_server.engine.latent_sample import LatentSample, new_sample, stack_inputs
from darkroom_server.engine.loading.defaults import Defaults
from darkroom_server.engine.pipelines.arguments import Arguments
from darkroom_server.engine.pipelines.calls import DenoiserCall
from darkroom_server.engine.pipelines.finish import finish
from darkroom_server.engine.pipelines.runs import Runs
from darkroom_server.engine.pipelines.sample import SuspendedSample, denoiser_call
from darkroom_server.engine.sample import Sample
from darkroom_server.engine.stepping.schedules import Schedules
from darkroom_server.engine.warmup.formats import MemoryFormat


class StableDiffusion(Family):
    """The family of ``StableDiffusionPipeline``."""

    pipeline_class = "StableDiffusionPipeline"
    components = ("unet", "vae", "text_encoder")
    optional = ("safety_checker", "feature_extractor", "image_encoder")
    pipeline_options: ClassVar[Mapping[str, Any]] = {"requires_safety_checker": False}
    defaults = Defaults(steps=30, guidance_scale=7.5)
    denoiser_name = "unet"
    convolutional = True
    tasks: ClassVar[Mapping[Task, str]] = {
        Task.IMAGE_TO_IMAGE: "StableDiffusionImg2ImgPipeline",
        Task.INPAINT: "StableDiffusionInpaintPipeline",
    }
    strength_rounding = StrengthRounding.TAKEN
    takes_ip_adapter = True
    control_kind = UNET_CONTROLS

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        self._image_runs: Runs | None = None

    @classmethod
    def check_folder(cls, folder: Path, name: str) -> None:
        """Check the tokenizer: without a vocabulary, transformers makes an empty one.

        Raises ``StartupError``.
        """
        tokenizer = folder / "tokenizer"
        whole = (tokenizer / "tokenizer.json").is_file()
        if not whole and not all((tokenizer / f).is_file() for f in ("vocab.json", "merges.txt")):
            raise StartupError(
                f"model {name!r} has no vocabulary in its tokenizer; copy or download it again"
            )

    def check_pipeline(self, name: str) -> None:
        """Raise ``StartupError`` for a guidance-distilled UNet, which takes one more input."""
        if self.pipeline.unet.config.time_cond_proj_dim is not None:
            raise StartupError(f"model {name!r} is guidance-distilled: not supported")

    def prepare(
        self, memory_format: MemoryFormat, precision: Precision, config: EngineConfig
    ) -> None:
        """Make the prompt encoder, and the pipelines of the jobs that bring an image."""
        tokenizer, encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        dtype = memory_format.dtype
        weighted = None
        if compel_is_installed():
            weighted = WeightedPromptEncoder([tokenizer], [encoder], dtype, precision)
        self._prompts = PromptEncoder(
            tokenizer, encoder, dtype, precision, config.prompt_cache_bytes, weighted
        )
        self._image_runs = image_runs_of(self, memory_format, precision)

    @property
    def optional_fields(self) -> frozenset[str]:
        """Those of ``core.model.OPTIONAL_FIELDS`` that it takes if their extra is installed."""
        return super().optional_fields | {"prompt_syntax"}

    @property
    def latent_factor(self) -> int:
        """Pixels of an image for one pixel of its latents, on each side."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int(self.pipeline.unet.config.in_channels)

    @property
    def latent_size(self) -> int:
        """Width and height of the latents of an image of the size that the model was trained at."""
        return int(self.pipeline.unet.config.sample_size)

    @property
    def prompt_tokens(self) -> int:
        """Tokens that the model reads of a prompt, the start and end marks included."""
        return int(self.pipeline.tokenizer.model_max_length)

    @property
    def kept_bytes_per_row(self) -> int:
        """The projections of a prompt, see ``PromptProjections``; nothing on a GPU."""
        unet = self.pipeline.unet
        return bytes_per_prompt(unet, self.prompt_tokens) if unet.device.type == "cpu" else 0

    def limits(self, max_rows: int) -> ModelLimits:
        """Half to twice the size that the model was trained at; outside, images fall apart."""
        return ModelLimits(
            min_size=max(8 * self.latent_factor, self.size // 2),
            max_size=self.size * 2,
            size_multiple=self.latent_factor,
            prompt_tokens=self.prompt_tokens,
            max_rows=max_rows,
        )

    def denoiser_inputs(
        self, rows: int, dtype: torch.dtype, device: torch.device, layout: torch.memory_format
    ) -> dict[str, Any]:
        """Keyword arguments of one UNet call of ``rows`` images of the default size, at random."""
        width = self.pipeline.unet.config.cross_attention_dim
        return {
            **no_image_arguments(self.ip_adapter, rows),
            "sample": self._random_latents(dtype, device, rows).contiguous(memory_format=layout),
            "timestep": torch.full((rows,), 500.0, device=device),
            "encoder_hidden_states": _random_normal(
                (rows, self.prompt_tokens, width), dtype, device
            ),
            "return_dict": False,
        }

    def latents(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Random latents of one image of the default size."""
        return self._random_latents(dtype, device, 1)

    def encode_prompt(self) -> bool:
        """Encode a prompt past the cache, for measurements."""
        self._prompts.encode_uncached("a photograph of a tree")
        return True

    def _random_latents(
        self, dtype: torch.dtype, device: torch.device, images: int
    ) -> torch.Tensor:
        side = self.size // self.latent_factor
        return _random_normal((images, self.latent_channels, side, side), dtype, device)

    def new_model(
        self,
        info: ModelInfo,
        memory_format: MemoryFormat,
        device: torch.device,
        precision: Precision,
        decoder: Decoder,
        safety: SafetyChecker | None,
    ) -> "StableDiffusionModel":
        """The model to serve; its pipeline is on ``device``, in ``memory_format``, and measured."""
        pipeline = self.pipeline
        self._prompts.adapters = self.adapters
        image_runs = self._image_runs
        if image_runs is not None:
            image_runs = replace(
                image_runs, adapters=self.adapters, controls=self.controls, forms=self.forms
            )
        return StableDiffusionModel(
            info=info,
            prompts=self._prompts,
            unet=pipeline.unet,
            decoder=decoder,
            previewer=Previewer(pipeline.vae, precision, self.latent_factor),
            safety=safety,
            precision=precision,
            schedules=Schedules(config_of(pipeline.scheduler)),
            latent_channels=self.latent_channels,
            latent_factor=self.latent_factor,
            device=device,
            memory_format=memory_format,
            image_runs=image_runs,
            adapters=self.adapters,
            ip_adapter=self.ip_adapter,
            controls=self.controls,
            forms=self.forms,
            projections=PromptProjections(pipeline.unet) if device.type == "cpu" else None,
            shared=SharedRows(pipeline.unet) if device.type == "cpu" else None,
        )


@dataclass(slots=True, kw_only=True)
class StableDiffusionModel:
    """A Stable Diffusion model in memory; ``schedules`` are on the folder's own configuration.

    ``projections`` are None on a GPU, where memory limits a batch more than a few small products,
    and so is ``shared``: there each kernel more costs a lone image time.

    Images from text are ``LatentSample``. Those of jobs that bring an image are runs of diffusers'
    own pipelines, ``image_runs``; both kinds share batches.
    """

    info: ModelInfo
    prompts: PromptEncoder
    unet: Any
    decoder: Decoder
    previewer: Previewer | None
    safety: SafetyChecker | None
    precision: Precision
    schedules: Schedules
    latent_channels: int
    latent_factor: int
    device: torch.device
    memory_format: MemoryFormat
    image_runs: Runs | None = None
    adapters: ModelAdapters | None = None
    attention: SlicedAttention | None = None
    ip_adapter: IpAdapter | None = None
    controls: ModelControls | None = None
    forms: DenoiserForms | None = None
    projections: PromptProjections | None = None
    shared: SharedRows | None = None

    @property
    def counts(self) -> tuple[Counts, ...]:
        """The counters of the model's components."""
        return (self.prompts.counts, self.decoder.counts)

    @property
    def prompt_cache_bytes(self) -> int:
        """The bytes of the embeddings in the prompt cache."""
        return self.prompts.cache_bytes

    def clear_prompt_cache(self) -> None:
        """Forget the embeddings of all prompts."""
        self.prompts.clear()

    batches_prompts = True
    encodes_slowly = False

    def encode_prompts(self, jobs: Sequence[Job]) -> list[Embeddings]:
        """For each job, the embeddings of its prompts, in one call for all jobs."""
        found = self.prompts.encode(key for job in jobs for key in self._prompts_of(job))
        return [found] * len(jobs)

    def new_samples(self, job: Job, embeddings: Embeddings) -> Sequence[Sample]:
        """A sample for each of ``job.image_indices``, at its first step."""
        shape = (
            self.latent_channels,
            job.height // self.latent_factor,
            job.width // self.latent_factor,
        )
        rows = self.prompts.padded(*(embeddings[key] for key in self._prompts_of(job)))
        if any(embedding.truncated for embedding in rows):
            self.prompts.counts[Counted.PROMPTS_TRUNCATED] += 1
        if job.image is not None or job.ip_adapter_image is not None:
            return self._start_with_image(job, rows)
        fields: dict[str, Any] = {
            "embeddings": rows,
            "latent_shape": shape,
            "device": self.device,
            "dtype": self.memory_format.dtype,
            "further_arguments": no_image_arguments(self.ip_adapter, len(rows)),
            "adapter_key": group_key(self.adapters, job),
        }
        samples = [new_sample(job, i, self.schedules, **fields) for i in job.image_indices]
        for sample in samples:
            sample.controls = controls_of(self.controls, sample)
        return samples

    def decode(self, sample: LatentSample | SuspendedSample) -> NDArray[np.uint8] | Failure:
        """The pixels of a finished sample: [height, width, 3], 0 to 255."""
        if isinstance(sample, SuspendedSample):
            assert self.image_runs is not None
            return finish(sample, self.decoder, self.image_runs)
        return self.decoder.decode(sample.latents)

    def denoise(self, samples: Sequence[LatentSample | SuspendedSample]) -> list[Any]:
        """One UNet call: for each sample what its ``advance`` takes."""
        from_text = [sample for sample in samples if isinstance(sample, LatentSample)]
        if len(from_text) == len(samples):
            return self._denoise_latents(from_text)
        assert self.image_runs is not None
        calls = [
            DenoiserCall(self.unet, sample.denoiser_arguments())
            if isinstance(sample, LatentSample)
            else denoiser_call(sample)
            for sample in samples
        ]
        jobs = [(sample.job, sample.rows) for sample in samples]
        with denoising(self.adapters, jobs), row_scales(self.ip_adapter, jobs):
            outputs = self.image_runs.denoise(calls, samples)
        return [
            output[0] if isinstance(sample, LatentSample) else output
            for sample, output in zip(samples, outputs, strict=True)
        ]

    def _denoise_latents(self, samples: Sequence[LatentSample]) -> list[torch.Tensor]:
        """The prediction [rows, channels, h, w] of each sample, without the cost of a spec."""
        latents, timesteps = stack_inputs(samples)
        prompts = [e.hidden for s in samples for e in s.embeddings]
        projections = self.projections
        context = projections.context(prompts) if projections is not None else torch.cat(prompts)
        given: Arguments = {
            "sample": latents.contiguous(memory_format=self.memory_format.layout),
            "timestep": timesteps,
            "encoder_hidden_states": context,
            "return_dict": False,
            **no_image_arguments(self.ip_adapter, len(context)),
        }
        given = controlled(self.controls, given, samples)
        jobs = [(sample.job, sample.rows) for sample in samples]
        adapted = any(sample.job.active_loras for sample in samples)
        whole = adapted or any(sample.job.exact for sample in samples)
        with (
            self.precision(),
            denoising(self.adapters, jobs),
            keeping(None if adapted else projections),
            sharing(None if whole else self.shared, [sample.rows for sample in samples]),
        ):
            predicted: torch.Tensor = run_denoiser(self.forms, self.unet, given, samples)[0]
        return list(torch.split(predicted, [sample.rows for sample in samples]))

    def _start_with_image(self, job: Job, rows: Sequence[Embedding]) -> list[SuspendedSample]:
        """The samples of ``job``; ``rows`` are its prompts, as in a ``LatentSample``."""
        assert self.image_runs is not None, "the model takes no images"
        given = {"prompt_embeds": rows[-1].hidden}
        if len(rows) == 2:
            given["negative_prompt_embeds"] = rows[0].hidden
        samples, _ = self.image_runs.start_all(
            job,
            steps=self.info.denoiser_calls(job),
            prompt_truncated=any(row.truncated for row in rows),
            given=given,
        )
        return samples

    def _prompts_of(self, job: Job) -> list[PromptKey]:
        """What is encoded for each row of an image, in the order of the rows."""
        texts = [job.negative_prompt] if self.info.rows_per_image(job) == 2 else []
        mix = encoder_mix(self.adapters, job)
        # Weighted prompts are never encoded together, so exact jobs share theirs with others.
        alone = job.exact or job.prompt_syntax is PromptSyntax.WEIGHTED
        return [PromptKey(text, alone, job.prompt_syntax, mix) for text in [*texts, job.prompt]]


def _random_normal(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Normally distributed values, the same ones in each call, for measurements."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)
