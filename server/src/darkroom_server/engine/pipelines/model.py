"""A model whose samples are suspended runs of its own pipeline."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from darkroom_server.core.errors import Failure
from darkroom_server.core.events import Counted
from darkroom_server.core.job import Job
from darkroom_server.core.model import ModelInfo
from darkroom_server.engine.adapters.model_adapters import ModelAdapters, denoising
from darkroom_server.engine.components.attention import SlicedAttention
from darkroom_server.engine.components.decoder import Decoder
from darkroom_server.engine.components.previewer import Previewer
from darkroom_server.engine.components.safety_checker import SafetyChecker
from darkroom_server.engine.conditioning.ip_adapter import row_scales
from darkroom_server.engine.counters import Counts
from darkroom_server.engine.forms.denoiser_forms import DenoiserForms
from darkroom_server.engine.pipelines.finish import finish
from darkroom_server.engine.pipelines.runs import PromptFailed, Runs
from darkroom_server.engine.pipelines.sample import SuspendedSample, denoiser_call


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
    attention: SlicedAttention | None = None

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
    def forms(self) -> DenoiserForms | None:
        """The forms of its denoiser."""
        return self.runs.forms

    @property
    def counts(self) -> tuple[Counts, ...]:
        """The counters of the model's components."""
        return (self.prompt_counts, self.decoder.counts)

    @property
    def prompt_cache_bytes(self) -> int:
        """The bytes of the embeddings in the prompt cache."""
        return self.runs.host.memo.bytes

    def clear_prompt_cache(self) -> None:
        """Forget the embeddings of all prompts."""
        self.runs.host.memo.clear()

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
        jobs = [(sample.job, sample.rows) for sample in samples]
        with denoising(self.adapters, jobs), row_scales(self.runs.ip_adapter, jobs):
            return self.runs.denoise([denoiser_call(sample) for sample in samples], samples)

    def decode(self, sample: SuspendedSample) -> NDArray[np.uint8] | Failure:
        """The pixels of a finished sample: [height, width, 3], 0 to 255.

        Raises an error that means that the device is lost.
        """
        return finish(sample, self.decoder, self.runs)

    def _start(self, job: Job) -> list[SuspendedSample] | Exception:
        truncated = self.is_truncated(job)
        steps = self.info.denoiser_calls(job)
        try:
            samples, prompts = self.runs.start_all(job, steps=steps, prompt_truncated=truncated)
        except PromptFailed as failed:
            raise failed.error from None
        except Exception as error:  # noqa: BLE001 - the runner contains it.
            return error
        self.prompt_counts[Counted.PROMPTS_ENCODED] += prompts
        self.prompt_counts[Counted.PROMPTS_CACHED] += not prompts
        self.prompt_counts[Counted.PROMPTS_TRUNCATED] += truncated
        return samples
