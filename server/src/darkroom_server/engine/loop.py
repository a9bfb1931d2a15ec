"""The engine's heartbeat: schedule, run, postprocess, once for every pass of the denoiser."""

import queue
import time
from collections.abc import Callable, Mapping

import structlog
import torch

from darkroom_server.core.errors import Failure
from darkroom_server.core.events import (
    BatchDone,
    Counted,
    DecodeDone,
    Event,
    JobCancelled,
    JobFailed,
    JobStarted,
    JobTaken,
    SampleProgress,
)
from darkroom_server.core.job import Job
from darkroom_server.core.order import FairShare, pick
from darkroom_server.engine.batching.encode_pool import EncodePool
from darkroom_server.engine.batching.resident_job import ResidentJob
from darkroom_server.engine.batching.resident_jobs import ResidentJobs
from darkroom_server.engine.counters import CounterReporter
from darkroom_server.engine.device.memory_reporter import MemoryReporter
from darkroom_server.engine.device.peak_memory import PeakMemoryTracker
from darkroom_server.engine.device.timer import Timer
from darkroom_server.engine.failures import (
    OUT_OF_MEMORY,
    SCHEDULER_FAILED,
    is_fatal,
    is_out_of_memory,
)
from darkroom_server.engine.families.stable_diffusion import LoadedModel
from darkroom_server.engine.sample import Group, Sample
from darkroom_server.ipc.commands import Cancel, Close, Extend

log = structlog.get_logger(__name__)


class EngineLoop:
    """Develops the samples of all resident jobs; ``run`` is the only method that blocks.

    Everything that touches torch happens on the thread that calls ``run``. ``submit``, ``cancel``
    and ``close`` may be called from any thread; ``emit`` is called from ``run``'s thread and from
    those that encode images.
    """

    def __init__(self, models: Mapping[str, LoadedModel], emit: Callable[[Event], None]) -> None:
        self._models = models
        self._emit = emit
        self._inbox: queue.SimpleQueue[Job | Cancel | Extend | Close] = queue.SimpleQueue()
        self._roster = ResidentJobs(emit)
        self._turns: FairShare[Group] = FairShare()
        self._encoding = EncodePool(abandon=self.cancel)
        self._tally = CounterReporter({id: model.counts for id, model in models.items()}, emit)
        self._peaks = PeakMemoryTracker(emit)
        self._memory = MemoryReporter({m.device for m in models.values()}, self._peaks, emit)

    def submit(self, job: Job) -> None:
        """Let ``job`` join at the next step boundary."""
        self._inbox.put(job)

    def cancel(self, job_id: str) -> None:
        """Let a job leave at the next step boundary."""
        self._inbox.put(Cancel(job_id))

    def extend(self, job_id: str, deadline: float | None) -> None:
        """Give a job until ``deadline`` instead, from the next step boundary on."""
        self._inbox.put(Extend(job_id, deadline))

    def close(self) -> None:
        """End ``run`` at the next step boundary; what is resident is dropped."""
        self._inbox.put(Close())

    @torch.inference_mode()
    def run(self) -> None:
        """Work until ``close``; raises what means that the device is lost."""
        self._memory.start()
        try:
            while self._listen():
                chosen = self._schedule()
                finished = self._run(chosen)
                self._postprocess(finished)
                self._tally.tell()
        finally:
            self._memory.close()
            self._encoding.close()

    def _listen(self) -> bool:
        """Take in what callers want, waiting only when there is nothing else to do."""
        while True:
            try:
                command = self._inbox.get(block=self._roster.idle)
            except queue.Empty:
                break
            match command:
                case Job():
                    self._roster.add(command)
                case Cancel():
                    if resident := self._roster.get(command.job_id):
                        self._drop(resident, expired=False)
                case Extend(job_id, deadline):
                    if resident := self._roster.get(job_id):
                        resident.extend(deadline)
                case Close():
                    return False
        now = time.monotonic()
        for resident in self._roster.residents:
            if resident.job.deadline is not None and resident.job.deadline <= now:
                self._drop(resident, expired=True)
        return True

    def _schedule(self) -> list[Sample]:
        """Let newcomers join, and choose the samples of the next pass."""
        self._join()
        groups = self._roster.developing()
        if not groups:
            return []
        group = self._turns.next(groups)
        samples = groups[group]
        max_rows = self._models[group.model].max_rows(group)
        chosen = pick([sample.key() for sample in samples.values()], max_rows)
        return [samples[key.id] for key in chosen]

    def _run(self, samples: list[Sample]) -> list[Sample]:
        """One pass: each of ``samples`` takes one step. Returns those that took their last."""
        if not samples:
            return []
        began = time.monotonic()
        for sample in samples:
            if self._resident(sample).pass_begins(began):
                self._emit(JobStarted(sample.job.id))
        model = self._models[samples[0].job.model]
        rows = sum(sample.rows for sample in samples)
        company = any(sample.step for sample in samples)
        joined = sum(not sample.step for sample in samples) if company else 0
        job = samples[0].job
        with self._peaks.watch(model.device, job.model, job.width, job.height, rows):
            stepped = self._step(samples, model.denoiser.predict(samples))
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
        now = time.monotonic()
        self._turns.charge(samples[0].group, now - began)
        self._account(stepped, began, now, joined)
        self._preview(stepped)
        finished = [sample for sample in stepped if sample.done]
        for sample in finished:
            self._roster.developed(sample)
            self._resident(sample).denoised(now)
        return finished

    def _postprocess(self, samples: list[Sample]) -> None:
        """Decode finished samples, one at a time, and hand their pixels to the encoding pool."""
        for sample in samples:
            resident = self._roster.get(sample.job.id)
            if resident is None:
                continue  # Another image of its job could not be decoded.
            job = sample.job
            model = self._models[job.model]
            began = time.monotonic()
            with (
                structlog.contextvars.bound_contextvars(**job.log_fields),
                self._peaks.watch(model.device, job.model, job.width, job.height),
            ):
                pixels = model.decoder.decode(sample.latents)
            if isinstance(pixels, Failure):
                self._fail(resident, pixels)
                continue
            now = time.monotonic()
            self._emit(
                DecodeDone(model=job.model, width=job.width, height=job.height, seconds=now - began)
            )
            if resident.decoded(now):
                self._roster.remove(resident)  # What is left to do is the pool's.
            flagged = model.safety is not None and model.safety.flags(pixels)
            self._encoding.submit(resident, sample, model, pixels, flagged=flagged)

    def _join(self) -> None:
        """Encode the newcomers' prompts together and turn the newcomers into samples."""
        for model_id, residents in self._roster.take_newcomers().items():
            model = self._models[model_id]
            # Told before: should it kill the engine, it is known what it was about.
            for resident in residents:
                self._emit(JobTaken(resident.job.id))
            with Timer(model.device) as watch:
                encoded = model.encode_prompts([resident.job for resident in residents])
            for resident, embeddings in zip(residents, encoded, strict=True):
                if isinstance(embeddings, Failure):
                    self._fail(resident, embeddings)
                    continue
                resident.prompt_encoded(watch)
                try:
                    samples = model.new_samples(resident.job, embeddings)
                except Exception as error:
                    if is_fatal(error):
                        raise
                    self._scheduler_failed(resident, error)
                    continue
                self._roster.develop(resident, samples)

    def _step(
        self, samples: list[Sample], predictions: list[torch.Tensor | Failure]
    ) -> list[Sample]:
        """Give every sample its prediction; returns those that took it and whose job goes on."""
        for sample, prediction in zip(samples, predictions, strict=True):
            resident = self._roster.get(sample.job.id)
            if resident is None:
                continue  # Another image of its job failed in this pass.
            if isinstance(prediction, Failure):
                self._fail(resident, prediction)
                continue
            try:
                sample.advance(prediction)
            except Exception as error:
                if is_fatal(error):
                    raise
                self._scheduler_failed(resident, error)
        return [sample for sample in samples if self._roster.get(sample.job.id)]

    def _scheduler_failed(self, resident: ResidentJob, error: Exception) -> None:
        """Fail a job whose own scheduler raised ``error``."""
        job = resident.job
        if is_out_of_memory(error):
            log.warning("scheduler ran out of memory", **job.log_fields)
            self._models[job.model].denoiser.counts[Counted.OUT_OF_MEMORY_FAILED] += 1
            self._fail(resident, OUT_OF_MEMORY)
        else:
            log.error("scheduler failed", exc_info=error, **job.log_fields)
            self._fail(resident, SCHEDULER_FAILED)

    def _account(self, samples: list[Sample], began: float, ended: float, joined: int) -> None:
        """Tell of the steps and of their pass, and charge each sample its rows' share of it."""
        seconds = ended - began
        rows = sum(sample.rows for sample in samples)
        for sample in samples:
            sample.rows_in_last_pass = rows
            sample.engine_seconds += seconds * sample.rows / rows
            self._emit(
                SampleProgress(
                    job_id=sample.job.id,
                    image_index=sample.index,
                    step=sample.step,
                    steps=sample.steps,
                    rows=rows,
                    seconds=seconds,
                )
            )
        if samples:
            job = samples[0].job
            self._emit(
                BatchDone(
                    model=job.model,
                    width=job.width,
                    height=job.height,
                    rows=rows,
                    seconds=seconds,
                    samples=len(samples),
                    joined=joined,
                    max_rows=self._models[job.model].max_rows(samples[0].group),
                    ended_at=ended,
                )
            )

    def _preview(self, samples: list[Sample]) -> None:
        """Paint the samples whose previews are due, unless their last is still being encoded.

        What a safety checker may withhold in the end is not shown before.
        """
        for sample in samples:
            clean, sample.clean = sample.clean, None
            model = self._models[sample.job.model]
            if clean is None or sample.previewing or model.safety is not None:
                continue
            if (pixels := model.previewer.decode_preview(clean)) is not None:
                self._encoding.submit_preview(self._resident(sample), sample, pixels)

    def _resident(self, sample: Sample) -> ResidentJob:
        resident = self._roster.get(sample.job.id)
        if resident is None:
            raise KeyError(sample.job.id)
        return resident

    def _drop(self, resident: ResidentJob, *, expired: bool) -> None:
        self._roster.remove(resident)
        resident.end(JobCancelled(resident.job.id, expired, resident.engine_seconds))

    def _fail(self, resident: ResidentJob, failure: Failure) -> None:
        self._roster.remove(resident)
        resident.end(JobFailed(resident.job.id, failure))
