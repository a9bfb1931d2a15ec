"""The runner: everything that calls a model, for the samples that the batch scheduler chose."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from darkroom_server.core.errors import Failure
from darkroom_server.core.events import Counted, Event
from darkroom_server.core.job import Job
from darkroom_server.core.prompt_syntax import PromptTooLong
from darkroom_server.engine.batch import Batch, Group
from darkroom_server.engine.batching.row_limits import RowLimits
from darkroom_server.engine.batching.run_or_split import run_or_split
from darkroom_server.engine.counters import Counts
from darkroom_server.engine.device.peak_memory import PeakMemoryTracker
from darkroom_server.engine.device.timer import Timer
from darkroom_server.engine.failures import (
    DENOISER_FAILED,
    INPUT_FAILED,
    OUT_OF_MEMORY,
    PROMPT_FAILED,
    PROMPT_OUT_OF_MEMORY,
    SCHEDULER_FAILED,
    ImageNotEncoded,
    is_fatal,
    is_out_of_memory,
    prompt_too_long,
)
from darkroom_server.engine.families.base import Model
from darkroom_server.engine.sample import Sample
from darkroom_server.engine.stepping.merged_step import LinearStep, take_steps

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What a batch did, or what a GPU still does for it.

    ``stepped`` are the samples that took a step and whose job goes on, and ``steps`` are their
    counters after it. ``rows`` are those of these samples. ``control_cost`` is what ControlNets
    added, as a part of the denoiser's time. ``failures`` are those of the other jobs, by job id.
    ``timer`` knows when the device has done the batch.
    """

    stepped: list[Sample]
    steps: list[int]
    rows: int
    control_cost: float
    failures: dict[str, Failure]
    timer: Timer


@dataclass(frozen=True, slots=True)
class Started:
    """What new jobs of one model got: ``samples``, all noise, or the failure of each.

    ``timer`` timed their prompts, of which ``prompts`` were not cached.
    """

    samples: list[Sequence[Sample] | Failure]
    timer: Timer
    prompts: int


class Runner:
    """Owns the models; encodes prompts, runs batches, decodes. Has no queues.

    ``counts``: the counters of each model's components, by model id.
    Every method raises an error that means that the device is lost. Any other error becomes the
    ``Failure`` of the jobs that it affects.
    """

    def __init__(
        self,
        models: dict[str, Model],
        row_limits: Mapping[str, RowLimits],
        emit: Callable[[Event], None],
    ) -> None:
        self.models = models
        self.peaks = PeakMemoryTracker(emit)
        self._row_limits = row_limits
        self.counts: dict[str, tuple[Counts, ...]] = {}
        self._counts: dict[str, Counts] = {}
        for id in models:
            self.add(id)

    @property
    def devices(self) -> set[torch.device]:
        """The devices that hold models."""
        return {model.device for model in self.models.values()}

    def add(self, model_id: str) -> None:
        """Serve a model that is new among ``models``."""
        self._counts[model_id] = Counts()
        self.counts[model_id] = (*self.models[model_id].counts, self._counts[model_id])

    def remove(self, model_id: str) -> None:
        """Serve a model no more."""
        del self._counts[model_id], self.counts[model_id]

    def new_samples(self, model_id: str, jobs: Sequence[Job]) -> Started:
        """Start the samples of ``jobs``, all of one model, which may encode prompts together."""
        model = self.models[model_id]
        before = _prompts_encoded(model)
        with Timer(model.device) as timer:
            together = [jobs] if model.batches_prompts else [[job] for job in jobs]
            encoded = [
                each
                for part in together
                for each in run_or_split(part, model.encode_prompts, self._prompts_failed)
            ]
        started: list[Sequence[Sample] | Failure] = []
        for job, prepared in zip(jobs, encoded, strict=True):
            if isinstance(prepared, Failure):
                started.append(prepared)
                continue
            try:
                started.append(model.new_samples(job, prepared))
            except Exception as error:
                if is_fatal(error):
                    raise
                started.append(self._start_failed(job, error))
        return Started(started, timer, _prompts_encoded(model) - before)

    def run(self, batch: Batch) -> BatchResult:
        """Run the denoiser once: each sample of ``batch`` takes one step.

        Does not wait for a GPU, to which the result's ``timer`` leads.
        """
        model = self.models[batch.model]
        with (
            Timer(model.device) as timer,
            self.peaks.watch(model.device, batch.model, *batch.largest, batch.rows),
        ):
            predictions = run_or_split(batch.samples, self._denoise, self._denoiser_failed)
            stepped, failures = self._step(batch.samples, predictions)
        return BatchResult(
            stepped=stepped,
            steps=[sample.step for sample in stepped],
            rows=sum(sample.rows for sample in stepped),
            control_cost=self._control_cost(batch.model, stepped),
            failures=failures,
            timer=timer,
        )

    def _control_cost(self, model_id: str, stepped: Sequence[Sample]) -> float:
        """What ControlNets added to a batch, as a part of the denoiser's time.

        ``stepped`` are its samples, which took their step.
        """
        controlled = [sample for sample in stepped if sample.controls]
        if not controlled:
            return 0.0
        info = self.models[model_id].info
        costs = {offer.id: offer.cost for offer in info.adapters}
        extra = 0.0
        for sample in controlled:
            calls = info.guidance.calls_per_step(sample.job)
            applied = sample.controls_at(sample.step - 1, calls)
            extra += sample.rows * sum(costs[control.id] for control in applied)
        return extra / sum(sample.rows for sample in stepped)

    def preview(self, sample: Sample) -> NDArray[np.uint8] | None:
        """The pixels of ``sample``'s preview, None if none is due or the last is not yet encoded.

        A model with a safety checker has no previews: they would show images that are withheld.
        """
        predicted_x0, sample.predicted_x0 = sample.predicted_x0, None
        model = self.models[sample.job.model]
        if predicted_x0 is None or sample.preview_pending or model.safety is not None:
            return None
        if model.previewer is None:
            return None
        return model.previewer.decode_preview(predicted_x0)

    def decode(self, sample: Sample) -> NDArray[np.uint8] | Failure:
        """The pixels of a finished sample: [height, width, 3], 0 to 255."""
        job = sample.job
        model = self.models[job.model]
        with (
            structlog.contextvars.bound_contextvars(**job.log_fields),
            self.peaks.watch(model.device, job.model, job.width, job.height),
        ):
            pixels = model.decode(sample)
        if model.decoder.tiled:
            sample.memory_fallbacks.add("tiled_decode")
        return pixels

    def is_flagged(self, sample: Sample, pixels: NDArray[np.uint8]) -> bool:
        """Whether the model's safety checker, if it has one, withholds ``pixels``."""
        safety = self.models[sample.job.model].safety
        return safety is not None and safety.flags(pixels)

    def _denoise(self, samples: Sequence[Sample]) -> Sequence[Any]:
        group = samples[0].group
        model = self.models[group.model]
        if model.attention is not None and model.attention.fit(
            model.info.memory, group.width, group.height
        ):
            for sample in samples:
                sample.memory_fallbacks.add("sdpa")
        try:
            predictions = model.denoise(samples)
        except Exception as error:
            if not is_out_of_memory(error) or not _replace_slices(model, group):
                raise
        else:
            self._row_limits[group.model].record_success(group)
            return predictions
        # Outside the handler: the error's traceback keeps the failed call's tensors alive.
        torch.cuda.empty_cache()
        return self._denoise(samples)

    def _step(
        self, samples: Sequence[Sample], predictions: Sequence[Any]
    ) -> tuple[list[Sample], dict[str, Failure]]:
        """Give each sample its prediction. A job fails with the first of its samples that fails."""
        failures: dict[str, Failure] = {}
        begun: list[tuple[Sample, LinearStep]] = []
        for sample, prediction in zip(samples, predictions, strict=True):
            job = sample.job
            if job.id in failures:
                continue
            if isinstance(prediction, Failure):
                failures[job.id] = prediction
                continue
            try:
                if step := sample.begin_step(prediction):
                    begun.append((sample, step))
            except Exception as error:
                if is_fatal(error):
                    raise
                failures[job.id] = self._scheduler_failed(job, error)
        if begun:
            self._finish_steps(begun, failures)
        return [sample for sample in samples if sample.job.id not in failures], failures

    def _finish_steps(
        self, begun: Sequence[tuple[Sample, LinearStep]], failures: dict[str, Failure]
    ) -> None:
        """Take the steps that are ``begun`` together; adds to the ``failures`` of jobs."""
        results = run_or_split(begun, _take_steps, self._steps_failed)
        for (sample, _), result in zip(begun, results, strict=True):
            job = sample.job
            if job.id in failures:
                continue
            if isinstance(result, Failure):
                failures[job.id] = result
                continue
            try:
                sample.finish_step(result)
            except Exception as error:
                if is_fatal(error):
                    raise
                failures[job.id] = self._scheduler_failed(job, error)

    def _steps_failed(
        self, begun: Sequence[tuple[Sample, LinearStep]], error: Exception
    ) -> Failure:
        """The failure of one sample whose step raised ``error``; several are tried in halves."""
        sample, _ = begun[0]
        if len(begun) == 1:
            return self._scheduler_failed(sample.job, error)
        if is_out_of_memory(error):
            self._count_out_of_memory(sample.job.model, alone=False)
        return SCHEDULER_FAILED

    def _denoiser_failed(self, samples: Sequence[Sample], error: Exception) -> Failure:
        rows = sum(sample.rows for sample in samples)
        out_of_memory = is_out_of_memory(error)
        log.warning(
            "batch failed",
            request_ids=sorted({sample.job.request_id for sample in samples}),
            samples=len(samples),
            rows=rows,
            out_of_memory=out_of_memory,
            why=str(error),
            exc_info=not out_of_memory,
        )
        if not out_of_memory:
            return DENOISER_FAILED
        group = samples[0].group
        self._count_out_of_memory(group.model, alone=len(samples) == 1)
        if len(samples) > 1:
            self._row_limits[group.model].record_out_of_memory(group, rows)
        return OUT_OF_MEMORY

    def _prompts_failed(self, jobs: Sequence[Job], error: Exception) -> Failure:
        if isinstance(error, PromptTooLong):
            return prompt_too_long(error, jobs[0])
        out_of_memory = is_out_of_memory(error)
        log.warning(
            "prompts could not be encoded",
            request_ids=sorted({job.request_id for job in jobs}),
            jobs=len(jobs),
            out_of_memory=out_of_memory,
            exc_info=not out_of_memory,
        )
        if not out_of_memory:
            return PROMPT_FAILED
        self._count_out_of_memory(jobs[0].model, alone=len(jobs) == 1)
        return PROMPT_OUT_OF_MEMORY

    def _start_failed(self, job: Job, error: Exception) -> Failure:
        """The failure of a job whose samples could not be made because of ``error``."""
        if isinstance(error, ImageNotEncoded):
            log.error("input image could not be encoded", exc_info=error, **job.log_fields)
            return INPUT_FAILED
        return self._scheduler_failed(job, error)

    def _scheduler_failed(self, job: Job, error: Exception) -> Failure:
        """The failure of a job whose own noise scheduler raised ``error``."""
        if is_out_of_memory(error):
            log.warning("scheduler ran out of memory", **job.log_fields)
            self._count_out_of_memory(job.model, alone=True)
            return OUT_OF_MEMORY
        log.error("scheduler failed", exc_info=error, **job.log_fields)
        return SCHEDULER_FAILED

    def _count_out_of_memory(self, model_id: str, *, alone: bool) -> None:
        """Count a call that ran out of memory; one that is not ``alone`` is split."""
        outcome = Counted.OUT_OF_MEMORY_FAILED if alone else Counted.OUT_OF_MEMORY_SPLIT
        self._counts[model_id][outcome] += 1


def _replace_slices(model: Model, group: Group) -> bool:
    """Let batches of ``group``, one of which had no memory, run with SDPA; False if they cannot."""
    attention, needs = model.attention, model.info.memory
    return attention is not None and attention.replace_slices(needs, group.width, group.height)


def _take_steps(begun: Sequence[tuple[Sample, LinearStep]]) -> list[torch.Tensor]:
    return take_steps([step for _, step in begun])


def _prompts_encoded(model: Model) -> int:
    """The prompts that ``model`` has encoded since its counters were last emitted."""
    return sum(counts[Counted.PROMPTS_ENCODED] for counts in model.counts)
