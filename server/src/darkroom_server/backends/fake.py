"""The fake backend: images of one colour, generated on command, for tests."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from darkroom_server.backends.fake_model import fake_image, fake_model, fake_preview
from darkroom_server.core.errors import Failure
from darkroom_server.core.events import (
    BatchDone,
    EngineDied,
    EngineReady,
    Event,
    ImageReady,
    JobCancelled,
    JobFailed,
    JobFinished,
    JobStarted,
    JobTaken,
    SampleProgress,
    StageSeconds,
)
from darkroom_server.core.job import Job
from darkroom_server.core.model import (
    ModelInfo,
)


class FakeEngine:
    """An ``Engine`` whose batches run when ``advance`` is called.

    In a batch every resident image takes one step. With ``auto`` all batches of a job run when it
    is submitted; with ``pass_seconds`` a thread runs a batch at that interval. If ``load`` is
    False, the engine loads until ``become_ready`` is called. With ``startup_error`` it dies at
    ``start``, with ``dies_after`` once that many jobs were submitted. ``on_submit`` and
    ``on_cancel`` are called for each job. Events are emitted from the thread that causes them.
    """

    def __init__(
        self,
        models: Sequence[ModelInfo] = (),
        *,
        auto: bool = False,
        pass_seconds: float | None = None,
        load: bool = True,
        startup_error: str | None = None,
        dies_after: int | None = None,
        on_submit: Callable[[Job], None] = lambda _: None,
        on_cancel: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.models = tuple(models) or (fake_model(),)
        self.closed = threading.Event()
        self._auto = auto
        self._pass_seconds = pass_seconds
        self._load = load
        self._startup_error = startup_error
        self._dies_after = dies_after
        self._submitted = 0
        self._on_submit = on_submit
        self._on_cancel = on_cancel
        self._emit: Callable[[Event], None] = lambda _: None
        self._steps: dict[str, int] = {}
        self._jobs: dict[str, Job] = {}
        self._leaving: set[str] = set()
        self._taken: set[str] = set()
        self._lock = threading.RLock()

    def start(self, emit: Callable[[Event], None]) -> None:
        """Load at once, unless ``load`` or ``startup_error`` says otherwise."""
        self._emit = emit
        if self._startup_error is not None:
            emit(EngineDied(self._startup_error, fatal=True))
        elif self._load:
            self.become_ready()
        if self._pass_seconds is not None:
            threading.Thread(target=self._run, name="fake-engine", daemon=True).start()

    def submit(self, job: Job) -> None:
        """Add ``job`` to the next batch."""
        with self._lock:
            self._jobs[job.id] = job
            self._steps[job.id] = 0
            self._submitted += 1
            self._on_submit(job)
            if self._submitted == self._dies_after:
                self.die()
            if self._auto:
                self.advance(job.steps)

    def cancel(self, job_id: str) -> None:
        """Cancel a job at the next step boundary."""
        with self._lock:
            self._on_cancel(job_id)
            if job_id in self._jobs:
                self._leaving.add(job_id)
            if self._auto:
                self.advance(0)

    def extend(self, job_id: str, deadline: float | None) -> None:
        """Record the deadline, which nothing checks; call ``expire`` instead."""
        with self._lock:
            if job := self._jobs.get(job_id):
                self._jobs[job_id] = replace(job, deadline=deadline)

    def close(self) -> None:
        """Run no more batches; jobs end without an event."""
        self.closed.set()

    # For tests.

    @property
    def jobs(self) -> list[Job]:
        """The resident jobs, in the order of arrival."""
        with self._lock:
            return list(self._jobs.values())

    def become_ready(self) -> None:
        """Emit that the models are loaded."""
        self._emit(EngineReady(self.models, load_seconds=0.0))

    def advance(self, passes: int = 1) -> None:
        """Remove cancelled jobs, and run that many batches."""
        with self._lock:
            self._remove_cancelled()
            for _ in range(passes):
                self._run_batch()
                self._remove_cancelled()

    def take_newcomers(self) -> None:
        """Emit ``JobTaken`` for the jobs that arrived since the last batch."""
        with self._lock:
            for job_id in self._jobs:
                if job_id not in self._taken:
                    self._taken.add(job_id)
                    self._emit(JobTaken(job_id))

    def finish(self, job_id: str) -> None:
        """Finish one job alone, with all its images."""
        with self._lock:
            self._finish(self._jobs[job_id])

    def deliver(self, job_id: str, index: int) -> None:
        """Emit one image of a job that goes on."""
        with self._lock:
            image = fake_image(self._jobs[job_id], index)
            self._emit(ImageReady(job_id=job_id, image_index=index, image=image))

    def fail(self, job_id: str, failure: Failure) -> None:
        """Fail a job."""
        with self._lock:
            self._remove(job_id)
            self._emit(JobFailed(job_id, failure))

    def expire(self, job_id: str) -> None:
        """Cancel a job as expired."""
        with self._lock:
            self._remove(job_id)
            self._emit(JobCancelled(job_id, expired=True, wasted_seconds=0.0))

    def die(self, message: str = "the fake engine was told to die", *, fatal: bool = False) -> None:
        """Die and lose every job; ``start`` starts it again, without jobs."""
        with self._lock:
            self._jobs.clear()
            self._steps.clear()
            self._leaving.clear()
            self._taken.clear()
            self._emit(EngineDied(message, fatal))

    def _run(self) -> None:
        while not self.closed.wait(self._pass_seconds):
            self.advance()

    def _remove_cancelled(self) -> None:
        for job_id in self._leaving & self._jobs.keys():
            wasted = self._steps[job_id] * (self._pass_seconds or 0.0)
            self._remove(job_id)
            self._emit(JobCancelled(job_id, expired=False, wasted_seconds=wasted))
        self._leaving.clear()

    def _run_batch(self) -> None:
        if not self._jobs:
            return
        rows = sum(job.rows_per_image * job.image_count for job in self._jobs.values())
        seconds = self._pass_seconds or 0.0
        self.take_newcomers()
        for job in self._jobs.values():
            if self._steps[job.id] == 0:
                self._emit(JobStarted(job.id))
            self._steps[job.id] += 1
            for index in job.image_indices:
                self._emit(
                    SampleProgress(
                        job_id=job.id,
                        image_index=index,
                        step=self._steps[job.id],
                        steps=job.steps,
                        rows=rows,
                        seconds=seconds,
                    )
                )
                if job.wants_preview(self._steps[job.id], job.steps):
                    self._emit(fake_preview(job, index, self._steps[job.id]))
        first = next(iter(self._jobs.values()))
        self._emit(
            BatchDone(
                model=first.model,
                width=first.width,
                height=first.height,
                rows=rows,
                seconds=seconds,
                samples=sum(len(job.image_indices) for job in self._jobs.values()),
                max_rows=self.models[0].limits.max_rows,
            )
        )
        for job in list(self._jobs.values()):
            if self._steps[job.id] >= job.steps:
                self._finish(job)

    def _finish(self, job: Job) -> None:
        for index in job.image_indices:
            image = fake_image(job, index)
            self._emit(ImageReady(job_id=job.id, image_index=index, image=image))
        self._remove(job.id)
        denoise = (self._pass_seconds or 0.0) * job.steps
        self._emit(JobFinished(job.id, StageSeconds(denoise=denoise)))

    def _remove(self, job_id: str) -> None:
        del self._jobs[job_id]
        del self._steps[job_id]
        self._taken.discard(job_id)
