"""A model whose samples are suspended runs of its own pipeline."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from PIL import Image

from darkroom_server.core.errors import Failure
from darkroom_server.core.events import Counted
from darkroom_server.core.job import Job
from darkroom_server.core.model import ModelInfo
from darkroom_server.engine.adapters.model_adapters import ModelAdapters, denoising
from darkroom_server.engine.components.decoder import Decoder
from darkroom_server.engine.components.previewer import Previewer
from darkroom_server.engine.components.safety_checker import SafetyChecker
from darkroom_server.engine.counters import Counts
from darkroom_server.engine.failures import (
    DECODE_FAILED,
    OUT_OF_MEMORY,
    is_fatal,
    is_out_of_memory,
)
from darkroom_server.engine.pipelines.calls import DecodeCall, DenoiserCall
from darkroom_server.engine.pipelines.runs import PromptFailed, Runs
from darkroom_server.engine.pipelines.sample import SuspendedSample, UnexpectedCall

log = structlog.get_logger(__name__)


@dataclass(slots=True, kw_only=True)
class SuspendedModel:
    """A model in memory whose samples are ``runs`` of its pipeline.

    ``is_truncated`` says whether a job's prompts are longer than the model reads.
    ``encodes_slowly``: batches must run between the prompts of two jobs.
    """

    info: ModelInfo
    runs: Runs
    is_truncated: Callable[[Job], bool]
    decoder: Decoder
    previewer: Previewer | None
    safety: SafetyChecker | None
    encodes_slowly: bool
    prompt_counts: Counts = field(default_factory=Counts)

    # Each prompt is encoded alone, as by the pipeline, so exact jobs need no encode of their own.
    batches_prompts = False

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.runs.host.device

    @property
    def adapters(self) -> ModelAdapters | None:
        """The adapters of its jobs."""
        return self.runs.adapters

    @property
    def counts(self) -> tuple[Counts, ...]:
        """The counters of the model's components."""
        return (self.prompt_counts, self.decoder.counts)

    @property
    def prompt_cache_bytes(self) -> int:
        """The bytes of the embeddings in the prompt cache."""
        return self.runs.host.memo.bytes

    def encode_prompts(self, jobs: Sequence[Job]) -> list[list[SuspendedSample] | Exception]:
        """For each job its samples at their first step, or why its pipeline did not get there.

        Raises what a text encoder raises.
        """
        return [self._start(job) for job in jobs]

    def new_samples(
        self, job: Job, encoded: list[SuspendedSample] | Exception
    ) -> list[SuspendedSample]:
        """The samples of ``job``; raises what their pipeline raised before its first step."""
        if isinstance(encoded, Exception):
            raise encoded
        return encoded

    def denoise(self, samples: Sequence[SuspendedSample]) -> list[Any]:
        """One denoiser call: for each sample the output for its rows."""
        calls = [_denoiser_call(sample) for sample in samples]
        module = calls[0].module
        jobs = [(sample.job, sample.rows) for sample in samples]
        spec = self.runs.spec
        if len(calls) == 1:
            # As the pipeline calls it: alone, an image is the pipeline's own to the last bit.
            arguments = calls[0].arguments
            given = arguments if spec is None else spec.alone(arguments)
            with denoising(self.adapters, jobs):
                return [self.runs.call_denoiser(module, given)]
        assert spec is not None, "without a spec, each sample is a group of its own"
        merged = spec.collate([call.arguments for call in calls])
        with denoising(self.adapters, jobs):
            output = self.runs.call_denoiser(module, merged)
        return list(spec.split(output, [sample.rows for sample in samples]))

    def decode(self, sample: SuspendedSample) -> NDArray[np.uint8] | Failure:
        """The pixels of a finished sample: [height, width, 3], 0 to 255.

        Raises an error that means that the device is lost.
        """
        try:
            while sample.pending is not None:
                if not isinstance(sample.pending, DecodeCall):
                    raise UnexpectedCall(f"a {type(sample.pending).__name__} after the last step")
                call = sample.pending
                image = self.decoder.decode_scaled(call.latents, call.options)
                if isinstance(image, Failure):
                    return image
                sample.resume(image)
            return _pixels(sample.result[0], sample.job)
        except Exception as error:
            if is_fatal(error):
                raise
            if is_out_of_memory(error):
                log.warning("decode ran out of memory", why=str(error), **sample.job.log_fields)
                self.decoder.counts[Counted.OUT_OF_MEMORY_FAILED] += 1
                return OUT_OF_MEMORY
            log.exception("decode failed", **sample.job.log_fields)
            return DECODE_FAILED
        finally:
            sample.result = None

    def _start(self, job: Job) -> list[SuspendedSample] | Exception:
        samples: list[SuspendedSample] = []
        truncated = self.is_truncated(job)
        steps = self.info.denoiser_calls(job)
        prompts = 0
        try:
            for index in job.image_indices:
                sample, encoded = self.runs.start(
                    job, index, steps=steps, prompt_truncated=truncated
                )
                samples.append(sample)
                prompts += encoded
        except Exception as error:  # noqa: BLE001 - the runner contains it.
            for sample in samples:
                sample.close()
            if isinstance(error, PromptFailed):
                raise error.error from None
            return error
        self.prompt_counts[Counted.PROMPTS_ENCODED] += prompts
        self.prompt_counts[Counted.PROMPTS_CACHED] += not prompts
        self.prompt_counts[Counted.PROMPTS_TRUNCATED] += truncated
        return samples


def _denoiser_call(sample: SuspendedSample) -> DenoiserCall:
    if not isinstance(sample.pending, DenoiserCall):
        raise UnexpectedCall(f"a {type(sample.pending).__name__} in place of a step")
    return sample.pending


def _pixels(image: Any, job: Job) -> NDArray[np.uint8]:
    """``image``, the first of what the pipeline returned, as [height, width, 3]."""
    first = image[0]
    if isinstance(first, Image.Image):
        pixels: NDArray[np.uint8] = np.asarray(first.convert("RGB"))
    else:
        # The arithmetic of diffusers' VaeImageProcessor, for equal values.
        unit = first.permute(1, 2, 0).float().cpu().numpy()
        pixels = (unit * 255).round().astype(np.uint8)
    if pixels.shape != (job.height, job.width, 3):
        raise UnexpectedCall(f"an image of {pixels.shape}, not {job.height}×{job.width}")
    return pixels
