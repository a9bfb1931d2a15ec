"""The engine's heartbeat: receive, choose the next batch, run it, publish what it did."""

import queue
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from darkroom_server.core.errors import Failure
from darkroom_server.core.events import (
    BatchDone,
    DecodeDone,
    DenoiserCompiled,
    EncodeDone,
    Event,
    JobTaken,
    RowLimitCorrected,
    SampleProgress,
)
from darkroom_server.core.job import Job
from darkroom_server.engine.adapters.offering import check_adapter
from darkroom_server.engine.adapters.sources import AdapterFound
from darkroom_server.engine.adapters.store import (
    NO_ADAPTERS,
    AdapterRead,
    AdapterSetup,
    AdapterStore,
)
from darkroom_server.engine.batch import Batch
from darkroom_server.engine.batching.encode_pool import EncodePool
from darkroom_server.engine.batching.residency import Residency
from darkroom_server.engine.batching.row_limits import RowLimits
from darkroom_server.engine.batching.runner import BatchResult, Runner
from darkroom_server.engine.batching.scheduler import BatchScheduler
from darkroom_server.engine.catalogue.global_settings import LoopPaused
from darkroom_server.engine.catalogue.loader import ModelLoader, ModelRead
from darkroom_server.engine.catalogue.resident_models import (
    LoopParts,
    ModelChange,
    ResidentModels,
)
from darkroom_server.engine.counters import CounterReporter
from darkroom_server.engine.device.memory_reporter import MemoryReporter
from darkroom_server.engine.device.timer import Timer
from darkroom_server.engine.families.base import Model
from darkroom_server.engine.forms.compiler import Compiled, Compiler
from darkroom_server.engine.sample import Sample
from darkroom_server.engine.warmup.measurement_cache import MeasurementCache
from darkroom_server.ipc.commands import (
    Cancel,
    CheckAdapter,
    Close,
    DescribeModels,
    Extend,
    LoadModel,
    OfferAdapter,
    UnloadModel,
    WithdrawAdapter,
)

Command = (
    Job | Cancel | Extend | Close | CheckAdapter | OfferAdapter | WithdrawAdapter | ModelChange
)


@dataclass(frozen=True, slots=True)
class _Launched:
    """A batch that was launched, and the encodes before it: model, prompts and timer of each."""

    batch: Batch
    result: BatchResult
    encodes: list[tuple[str, int, Timer]]


class EngineLoop:
    """Generates the images of all resident jobs; ``run`` is the only method that blocks.

    What a batch did is published when its device has done it. On a GPU the next batch is launched
    first, so that the device need not wait for the host.

    Everything that touches torch happens on the thread that calls ``run``. ``submit``, ``cancel``,
    ``extend`` and ``close`` may be called from any thread. ``emit`` is called from ``run``'s
    thread, the encode pool's and the memory reporter's. ``caches`` remember each model's row limit.
    ``adapters`` says which adapters there are, ``compiler`` compiles denoisers.
    """

    def __init__(
        self,
        models: dict[str, Model],
        emit: Callable[[Event], None],
        caches: dict[str, MeasurementCache],
        adapters: AdapterSetup = NO_ADAPTERS,
        compiler: Compiler | None = None,
        loader: ModelLoader | None = None,
    ) -> None:
        row_limits = {id: RowLimits.of_model(model.info) for id, model in models.items()}
        self._models = models
        self._row_limits = row_limits
        self._caches = caches
        self._emit = emit
        self._encodes: list[tuple[str, int, Timer]] = []
        self._launched: _Launched | None = None
        self._inbox: queue.SimpleQueue[Command | AdapterRead | AdapterFound | Compiled]
        self._inbox = queue.SimpleQueue()
        self._adaptable = {id: m.adapters for id, m in models.items() if m.adapters is not None}
        self._max_adapter_rank = adapters.max_rank
        self._adapters = AdapterStore(self._adaptable, adapters, self._inbox.put, emit)
        slow = {id for id, model in models.items() if model.encodes_slowly}
        self._residency = Residency({id: model.info for id, model in models.items()})
        self._scheduler = BatchScheduler(
            row_limits,
            self._residency,
            emit,
            encode_slowly=slow,
            max_adapters=adapters.max_in_batch,
        )
        self._runner = Runner(models, row_limits, emit)
        self._encode_pool = EncodePool()
        self._counters = CounterReporter(self._runner.counts, emit)
        devices = {loader.device} if loader else self._runner.devices
        self._memory = MemoryReporter(devices, self._runner.peaks, emit)
        self._compiler = compiler
        parts = LoopParts(
            runner=self._runner,
            scheduler=self._scheduler,
            residency=self._residency,
            row_limits=row_limits,
            caches=caches,
            adapters=self._adapters,
            adaptable=self._adaptable,
            encode_slowly=slow,
            compiler=compiler,
        )
        self._resident: ResidentModels | None = None
        if loader is not None:
            self._resident = ResidentModels(parts, loader, self._inbox.put, emit)

    def submit(self, job: Job) -> None:
        """Add ``job`` at the next step boundary."""
        self._inbox.put(job)

    def cancel(self, job_id: str) -> None:
        """Cancel a job at the next step boundary."""
        self._inbox.put(Cancel(job_id))

    def extend(self, job_id: str, deadline: float | None) -> None:
        """Replace a job's deadline at the next step boundary."""
        self._inbox.put(Extend(job_id, deadline))

    def change_adapters(self, change: CheckAdapter | OfferAdapter | WithdrawAdapter) -> None:
        """Check, offer or withdraw an adapter at the next step boundary."""
        self._inbox.put(change)

    def change_models(self, change: LoadModel | UnloadModel | DescribeModels) -> None:
        """Load or describe a model beside the jobs, or unload one, from the next step on."""
        self._inbox.put(change)

    def close(self) -> None:
        """End ``run`` at the next step boundary; resident jobs end without an event."""
        self._inbox.put(Close())

    @torch.inference_mode()
    def run(self) -> None:
        """Work until ``close``; raises an error that means that the device is lost."""
        self._memory.start()
        if self._compiler is not None:
            self._compiler.start(self._inbox.put)
        try:
            while self._receive():
                self._encode_newcomers()
                if batch := self._scheduler.next_batch():
                    self._run(batch)
                self._try_compiled()
                if self._resident is not None:
                    if self._resident.busy:
                        self._publish()
                        self._resident.work()
                    self._resident.account_for_graphs()
                self._counters.report()
        finally:
            self._memory.close()
            if self._compiler is not None:
                self._compiler.close()
            self._adapters.close()
            self._encode_pool.close()

    def _receive(self) -> bool:
        """Handle the waiting commands, and block only if there is nothing to run; False: closed."""
        while True:
            if self._resident is not None and self._resident.waiting:
                self._publish()
                self._resident.settle()
            idle = self._scheduler.idle and not any(
                part.busy for part in (self._compiler, self._resident) if part is not None
            )
            if idle:
                self._publish()
            if self._adapters.unwanted:
                self._adapters.free(self._scheduler.adapters_in_use)
            try:
                command = self._inbox.get(block=idle)
            except queue.Empty:
                break
            match command:
                case Job():
                    self._scheduler.add(command, ready=self._adapters.request(command))
                case AdapterRead():
                    self._add_adapter(command)
                case CheckAdapter(source):
                    self._adapters.find(source)
                case Compiled():
                    assert self._compiler is not None
                    self._compiler.add(command)
                case AdapterFound():
                    most = self._max_adapter_rank
                    self._emit(check_adapter(command, self._adaptable, most))
                case OfferAdapter(source):
                    self._adapters.offer(source)
                    for model in self._models.values():
                        # Embeddings of an adapter of this name may be of other weights.
                        model.clear_prompt_cache()
                case WithdrawAdapter(id):
                    self._adapters.withdraw(id)
                case Cancel(job_id):
                    self._publish()  # The job's seconds are complete then.
                    self._scheduler.cancel(job_id)
                case Extend(job_id, deadline):
                    self._scheduler.extend(job_id, deadline)
                case LoadModel() | UnloadModel() | DescribeModels() | ModelRead() | LoopPaused():
                    assert self._resident is not None
                    self._publish()
                    self._resident.handle(command)
                case Close():
                    return False
        self._scheduler.expire(time.monotonic())
        return True

    def _try_compiled(self) -> None:
        """Do a part of the trial of a compiled denoiser, and emit that it is used from now on."""
        if self._compiler is not None and (model := self._compiler.work()):
            self._emit(DenoiserCompiled(model))

    def _add_adapter(self, read: AdapterRead) -> None:
        """Let the jobs that waited for an adapter go on, or fail if it cannot be used."""
        arrived = self._adapters.add(read, self._scheduler.adapters_in_use)
        for job_id in arrived.ready:
            self._scheduler.set_ready(job_id)
        for job_id, failure in arrived.failed.items():
            if job_id in self._scheduler:
                self._scheduler.fail(job_id, failure)

    def _encode_newcomers(self) -> None:
        """Encode the prompts of new jobs together, and start their samples."""
        for model_id, residents in self._scheduler.take_newcomers().items():
            # Emit first, so that a crash can be attributed to these jobs.
            for resident in residents:
                self._emit(JobTaken(resident.job.id))
            jobs = [resident.job for resident in residents]
            started = self._runner.new_samples(model_id, jobs)
            if started.prompts:
                self._encodes.append((model_id, started.prompts, started.timer))
            for job, samples in zip(jobs, started.samples, strict=True):
                if isinstance(samples, Failure):
                    self._scheduler.fail(job.id, samples)
                    continue
                self._scheduler.start(job.id, samples, started.timer)
                if correction := self._residency.record(job, samples[0].held_bytes()):
                    self._emit(correction)

    def _run(self, batch: Batch) -> None:
        """Run ``batch``, publish the one before, and pass on what it finished."""
        self._scheduler.begin(batch, time.monotonic())
        result = self._runner.run(batch)
        self._publish()
        self._launched = _Launched(batch, result, self._encodes)
        self._encodes = []
        for job_id, failure in result.failures.items():
            self._scheduler.fail(job_id, failure)
        finished = [sample for sample in result.stepped if sample.done]
        # Images and previews come after their steps, and wait for the device themselves.
        waits = finished or any(sample.predicted_x0 is not None for sample in result.stepped)
        if waits or not result.timer.runs_ahead:
            self._publish()
        for sample in result.stepped:
            pixels = self._runner.preview(sample)
            if pixels is not None:
                self._encode_pool.submit_preview(self._scheduler.job_of(sample), sample, pixels)
        for sample in result.stepped:
            if not sample.done:
                self._scheduler.regroup(sample)
        if finished:
            ended = result.timer.wait()
            for sample in finished:
                self._scheduler.denoised(sample, ended)
        for sample in finished:
            self._decode(sample)

    def _publish(self) -> None:
        """Emit what the batch did that was launched last, once its device has done it."""
        if self._launched is None:
            return
        launched, self._launched = self._launched, None
        batch, result = launched.batch, launched.result
        ended = result.timer.wait()
        seconds = result.timer.seconds()
        self._scheduler.charge(batch, seconds)
        self._publish_encodes(launched.encodes)
        self._publish_steps(batch, result, seconds, ended)
        self._correct_row_limit(batch, result.rows, seconds)

    def _publish_encodes(self, encodes: list[tuple[str, int, Timer]]) -> None:
        """Emit the encodes before a batch, which waited for the device."""
        for model, prompts, timer in encodes:
            cached = self._models[model].prompt_cache_bytes
            self._emit(
                EncodeDone(
                    model=model, prompts=prompts, seconds=timer.seconds(), cache_bytes=cached
                )
            )

    def _publish_steps(
        self, batch: Batch, result: BatchResult, seconds: float, ended: float
    ) -> None:
        """Emit the steps and then their batch; charge each sample its rows' share of the time."""
        if not result.stepped:
            return
        rows = result.rows
        width, height = batch.largest
        for sample, step in zip(result.stepped, result.steps, strict=True):
            if sample.job.id not in self._scheduler:
                continue  # Its job ended after the batch was launched.
            sample.rows_in_last_batch = rows
            sample.engine_seconds += seconds * sample.rows / rows
            self._emit(
                SampleProgress(
                    job_id=sample.job.id,
                    image_index=sample.index,
                    step=step,
                    steps=sample.steps,
                    rows=rows,
                    seconds=seconds,
                )
            )
        self._emit(
            BatchDone(
                model=batch.model,
                width=width,
                height=height,
                rows=rows,
                seconds=seconds,
                samples=len(result.stepped),
                joined=batch.joined,
                max_rows=self._scheduler.max_rows(batch.group),
                ended_at=ended,
                adapters=batch.adapters,
                control_cost=result.control_cost,
            )
        )

    def _correct_row_limit(self, batch: Batch, rows: int, seconds: float) -> None:
        """Let a batch that ran as a whole correct its row limit; ``rows`` took a step."""
        if rows != batch.rows:
            return
        group, limits = batch.group, self._row_limits[batch.model]
        defaults = self._models[batch.model].info.defaults
        if not limits.record_batch(group, rows, seconds):
            return
        if (group.width, group.height) == (defaults.width, defaults.height):
            max_rows = limits.of(group)
            correction = RowLimitCorrected(batch.model, max_rows)
            self._residency.correct(correction)
            self._emit(correction)
            self._caches[batch.model].save_row_limit(max_rows)

    def _decode(self, sample: Sample) -> None:
        """Decode a finished sample and hand its pixels to the encode pool."""
        job = sample.job
        if job.id not in self._scheduler:
            return  # Another image of the job could not be decoded.
        began = time.monotonic()
        pixels = self._runner.decode(sample)
        if isinstance(pixels, Failure):
            self._scheduler.fail(job.id, pixels)
            return
        ended = time.monotonic()
        self._emit(
            DecodeDone(model=job.model, width=job.width, height=job.height, seconds=ended - began)
        )
        resident = self._scheduler.decoded(sample, ended)
        flagged = self._runner.is_flagged(sample, pixels)
        model = self._models[job.model].info
        self._encode_pool.submit(resident, sample, model, pixels, flagged=flagged)
