"""An engine that draws flat colours on command: for tests, ours and those of SDK users."""

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
    """An ``Engine`` whose passes are taken when ``advance`` is called.

    In a pass every resident image takes one step. With ``auto`` a job's passes are all taken as it
    is submitted; with ``pass_seconds`` a thread takes one pass after the other, that far apart.
    ``load`` False leaves the engine loading until ``become_ready`` is called, and
    ``startup_error`` lets it die instead; ``dies_after`` lets it die with that many jobs submitted.
    ``on_submit`` and ``on_cancel`` are called as jobs come
    and go. What happens is told from whatever thread makes it happen.
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
        """Load in no time, unless told otherwise."""
        self._emit = emit
        if self._startup_error is not None:
            emit(EngineDied(self._startup_error, fatal=True))
        elif self._load:
            self.become_ready()
        if self._pass_seconds is not None:
            threading.Thread(target=self._run, name="fake-engine", daemon=True).start()

    def submit(self, job: Job) -> None:
        """Let ``job`` join the next pass."""
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
        """Drop a job at the next step boundary."""
        with self._lock:
            self._on_cancel(job_id)
            if job_id in self._jobs:
                self._leaving.add(job_id)
            if self._auto:
                self.advance(0)

    def extend(self, job_id: str, deadline: float | None) -> None:
        """Note the deadline, which is never looked at: time stands still between passes."""
        with self._lock:
            if job := self._jobs.get(job_id):
                self._jobs[job_id] = replace(job, deadline=deadline)

    def close(self) -> None:
        """Stop taking passes; jobs end without an event."""
        self.closed.set()

    # What a test does.

    @property
    def jobs(self) -> list[Job]:
        """The jobs inside, in the order of their arrival."""
        with self._lock:
            return list(self._jobs.values())

    def become_ready(self) -> None:
        """Tell that the models are loaded."""
        self._emit(EngineReady(self.models, load_seconds=0.0))

    def advance(self, passes: int = 1) -> None:
        """Let cancelled jobs go, and take so many passes."""
        with self._lock:
            self._let_go()
            for _ in range(passes):
                self._take_pass()
                self._let_go()

    def take_newcomers(self) -> None:
        """Turn to the jobs that came since the last pass, which are about to be encoded."""
        with self._lock:
            for job_id in self._jobs:
                if job_id not in self._taken:
                    self._taken.add(job_id)
                    self._emit(JobTaken(job_id))

    def finish(self, job_id: str) -> None:
        """Take, for one job alone, all the passes that it still needs."""
        with self._lock:
            self._end_well(self._jobs[job_id])

    def deliver(self, job_id: str, index: int) -> None:
        """Tell of one image of a job that goes on."""
        with self._lock:
            image = fake_image(self._jobs[job_id], index)
            self._emit(ImageReady(job_id=job_id, image_index=index, image=image))

    def fail(self, job_id: str, failure: Failure) -> None:
        """Give a job up."""
        with self._lock:
            self._forget(job_id)
            self._emit(JobFailed(job_id, failure))

    def expire(self, job_id: str) -> None:
        """Let a job go because of its deadline, which is never looked at otherwise."""
        with self._lock:
            self._forget(job_id)
            self._emit(JobCancelled(job_id, expired=True, wasted_seconds=0.0))

    def die(self, message: str = "the fake engine was told to die", *, fatal: bool = False) -> None:
        """Die with every job inside; ``start`` brings it back, empty."""
        with self._lock:
            self._jobs.clear()
            self._steps.clear()
            self._leaving.clear()
            self._taken.clear()
            self._emit(EngineDied(message, fatal))

    def _run(self) -> None:
        while not self.closed.wait(self._pass_seconds):
            self.advance()

    def _let_go(self) -> None:
        for job_id in self._leaving & self._jobs.keys():
            wasted = self._steps[job_id] * (self._pass_seconds or 0.0)
            self._forget(job_id)
            self._emit(JobCancelled(job_id, expired=False, wasted_seconds=wasted))
        self._leaving.clear()

    def _take_pass(self) -> None:
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
                self._end_well(job)

    def _end_well(self, job: Job) -> None:
        for index in job.image_indices:
            image = fake_image(job, index)
            self._emit(ImageReady(job_id=job.id, image_index=index, image=image))
        self._forget(job.id)
        denoise = (self._pass_seconds or 0.0) * job.steps
        self._emit(JobFinished(job.id, StageSeconds(denoise=denoise)))

    def _forget(self, job_id: str) -> None:
        del self._jobs[job_id]
        del self._steps[job_id]
        self._taken.discard(job_id)
