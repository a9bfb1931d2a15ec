"""The life of accepted jobs: into the queue, to an engine, and to their one end."""

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from darkroom_server.core.errors import DarkroomError, Reason
from darkroom_server.core.events import StageSeconds
from darkroom_server.core.job import DEADLINE_SLACK_SECONDS, Job
from darkroom_server.dispatch.admission.controller import AdmissionController
from darkroom_server.dispatch.engines.free_rows import FreeRows
from darkroom_server.dispatch.engines.pool import EnginePool
from darkroom_server.dispatch.estimation.backlog import Backlog
from darkroom_server.dispatch.estimation.estimator import Estimator
from darkroom_server.dispatch.jobs import outcomes
from darkroom_server.dispatch.jobs.job import ActiveJob, JobState
from darkroom_server.dispatch.jobs.outcomes import Counts, Finished, JobOutcome
from darkroom_server.dispatch.jobs.registry import JobRegistry
from darkroom_server.dispatch.models.catalog import ModelCatalog
from darkroom_server.dispatch.observer import EstimateChecked, JobEnded, JobRerun, Observer

REFRESH_SECONDS = 1.0
"""Between two estimates of the backlog while there are jobs."""

PASSING_SHARE = 8.0
"""Of its run time: for how long a job lets others take free rows of the batches before it."""

REFRESH_SHARE = 0.02
"""The most of the event loop's time that they take: with many engines one takes long."""


class JobLifecycle:
    """Moves jobs through their states and ends each of them once.

    ``idle`` is set while no job is unfinished. ``backlog``: the unfinished work; set at each new
    job, and again every ``REFRESH_SECONDS``, for jobs are cancelled and estimates are wrong.
    ``on_room`` is called when a job has left.
    """

    def __init__(
        self,
        registry: JobRegistry,
        pool: EnginePool,
        admission: AdmissionController,
        estimator: Estimator,
        observer: Observer,
        models: ModelCatalog,
    ) -> None:
        self.counts = Counts()
        self.idle = asyncio.Event()
        self.idle.set()
        self.backlog = Backlog()
        self._refresh: asyncio.TimerHandle | None = None
        self.on_room: Callable[[], object] = lambda: None
        self._registry = registry
        self._pool = pool
        self._admission = admission
        self._estimator = estimator
        self._observer = observer
        self._models = models
        self._deadlines: dict[str, asyncio.TimerHandle] = {}
        self._load_due: asyncio.TimerHandle | None = None

    # Into the queue and to an engine.

    def enter(self, active: ActiveJob) -> None:
        """Queue an admitted job, and start it if an engine has room."""
        active.on_unsubscribed = self._cancel_unfollowed
        self.counts.accepted += 1
        self.idle.clear()
        if active.estimate is not None:
            self.backlog.finish_at = self._with_others(active.estimate.model_finish_at)
        if self._refresh is None:
            self._refresh_later(REFRESH_SECONDS)
        self._registry.enqueue(active)
        self._watch_deadline(active.job)
        self.feed()

    def feed(self) -> None:
        """Give waiting jobs to the engines while they have room, most urgent first.

        Those of models that no engine holds wait aside until the models are loaded. While one waits
        until the jobs of another model have ended, others may take the free rows of the batches.
        """
        queue = self._registry.queue()
        waiting: list[ActiveJob] = []
        held: set[str] = set()
        passing: FreeRows | None = None
        for position, active in enumerate(queue):
            absent = bool(waiting) and active.job.model not in held
            waits = absent or not (passing is None or passing.take(active))
            engine = None if waits else self._pool.choose(active)
            if engine is None:
                if not waiting:
                    held = self._pool.held
                waiting.append(active)
                if passing is not None or active.job.model not in held:
                    continue
                if self._pool.has_room_later(active) and _lets_others_pass(active):
                    passing = self._pool.free_rows()
                    continue
                # No job overtakes: one that waits for an empty engine would wait for ever.
                waiting += queue[position + 1 :]
                break
            self._registry.assign(active)
            engine.submit(active)
            if active.on_assigned is not None:
                active.on_assigned()
                active.on_assigned = None
            if passing is not None:
                passing = self._pool.free_rows()
        if waiting:
            self._set_positions(waiting)
        all_held = held.issuperset(active.job.model for active in waiting)
        # Another engine may load what a full one has.
        if not all_held or self._pool.models_wanted or (waiting and len(self._pool.engines) > 1):
            self._load_models()

    def _load_models(self) -> None:
        """Load and unload models, and end the jobs of those that cannot be loaded."""
        planned = self._models.plan()
        if self._load_due is not None:
            self._load_due.cancel()
            self._load_due = None
        if planned.again_at < math.inf:
            loop = asyncio.get_running_loop()
            self._load_due = loop.call_at(planned.again_at, self.feed)
        for model, error in planned.unusable.items():
            self.fail_waiting(model, error)
        if planned.freed:
            self.feed()

    def fail_waiting(self, model: str, error: DarkroomError) -> None:
        """End the jobs that wait for ``model``, which cannot be loaded."""
        for active in self._registry.queue():
            if active.job.model == model:
                self._remove(active, error)

    def extend(self, active: ActiveJob, deadline: float | None) -> None:
        """Move a job's deadline to ``deadline`` if that is later; None means no deadline."""
        job = active.job
        if active.ended or job.deadline is None:
            return
        if deadline is None or deadline > job.deadline:
            active.job = replace(job, deadline=deadline)
            self._watch_deadline(active.job)
            self._registry.reorder(active)
            if active.engine is not None:
                active.engine.extend(active)

    # What engines report.

    def finish(self, active: ActiveJob, stages: StageSeconds) -> None:
        """The engine has sent every image of the job."""
        if active.estimate is not None and not active.ended:
            self._check_estimate(active, time.monotonic())
        self._remove_from_engine(active, _result(active, stages))

    def fail(self, active: ActiveJob, error: DarkroomError) -> None:
        """The engine failed the job."""
        self._remove_from_engine(active, error)

    def engine_cancelled(self, active: ActiveJob, *, expired: bool) -> None:
        """The engine removed a job, because it was asked to or because the deadline passed."""
        if not expired:
            error = outcomes.failed(Reason.ENGINE_FAILED, "the engine dropped the job; try again")
            self._remove_from_engine(active, error)
        elif active.ended or not _has_time(active):
            self._remove_from_engine(active, outcomes.expired(begun=True))
        elif active.complete:
            self._remove_from_engine(active, _result(active, StageSeconds()))
        else:
            # A call that joined has a later deadline, and the engine learned of it too late.
            self._requeue(active)
            self.feed()

    def engine_died(self, jobs: Sequence[ActiveJob], *, last: bool, by_load: bool = False) -> None:
        """Requeue or end the jobs of a dead engine; ``last``: no engine will come back.

        ``by_load``: no job is the cause, but the load of a model.
        """
        for active in jobs:
            if by_load:
                active.reset()
            else:
                active.record_crash(time.monotonic())
            if active.ended or last:
                active.released = not active.ended
                self._remove(active, outcomes.stopped())
            elif active.crashes > 1:
                self._remove(active, outcomes.crashed_twice())
            elif active.complete:
                # Where the time went is lost with the engine.
                self._remove(active, _result(active, StageSeconds()))
            else:
                self._requeue(active)
                active.publish_restart()
                self._observer.on_event(JobRerun(active.job.model))
        self.feed()

    def no_engine_left(self) -> None:
        """End every job; the engines are gone for good."""
        for active in self._registry.all():
            active.released = not active.ended
        for active in self._registry.queue():
            self._remove(active, outcomes.stopped())
        for active in self._registry.all():
            self._end(active, outcomes.stopped())

    # What callers do.

    def cancel(self, job_id: str) -> None:
        """Cancel a job in any state; an unknown or ended one is ignored."""
        active = self._registry.get(job_id)
        if active is not None and not active.ended:
            self._withdraw(active)
            self._end(active, outcomes.cancelled())

    def hand_over(self, active: ActiveJob) -> None:
        """End a job here that another server has by now."""
        if not active.ended:
            active.released = True
            self._withdraw(active)
            self._end(active, outcomes.moved())

    def end_all(self, error: DarkroomError) -> None:
        """End every job with ``error``, and have the engines remove them."""
        for active in self._registry.all():
            if not active.ended:
                active.released = True
                self._withdraw(active)
                self._end(active, error)

    def _cancel_unfollowed(self, active: ActiveJob) -> None:
        """No call follows the job any more."""
        if active.ended:
            return
        # gRPC ends a call at its deadline by cancelling it, perhaps before our own timer.
        deadline = active.job.deadline
        if deadline is not None and deadline - DEADLINE_SLACK_SECONDS <= time.monotonic():
            self._expire(active.job.id)
        else:
            self.cancel(active.job.id)

    def _expire(self, job_id: str) -> None:
        active = self._registry.get(job_id)
        if active is None:
            return
        error = outcomes.expired(begun=active.state is not JobState.QUEUED)
        self._withdraw(active)
        self._end(active, error)

    # Out.

    def _withdraw(self, active: ActiveJob) -> None:
        """Take a job out of the queue, or have its engine remove it."""
        if active.engine is not None:
            active.engine.cancel(active)
        else:
            self._registry.remove(active)
            self._set_positions(self._registry.queue())

    def _requeue(self, active: ActiveJob) -> None:
        """Queue a job again that its engine did not finish; its finished images stay."""
        if active.engine is not None:
            active.engine.remove(active)
            active.reset()
        self._registry.enqueue(active)

    def _remove_from_engine(self, active: ActiveJob, result: Finished | DarkroomError) -> None:
        if active.engine is not None:
            active.engine.remove(active)
        self._remove(active, result)
        self.feed()

    def _remove(self, active: ActiveJob, result: Finished | DarkroomError) -> None:
        self._registry.remove(active)
        self._end(active, result)
        self.on_room()

    def _end(self, active: ActiveJob, result: Finished | DarkroomError) -> None:
        """End a job for its callers; ignored if it has ended."""
        outcome = active.end(result)
        if outcome is None:
            return
        if outcome is JobOutcome.EXPIRED:
            self._estimator.record_expired(active)
        if timer := self._deadlines.pop(active.job.id, None):
            timer.cancel()
        self._admission.release(active)
        self.counts.by_end[outcome] += 1
        self._observer.on_event(JobEnded(active.job.model, outcome, active.phase))
        if self.counts.accepted == self.counts.by_end.total():
            self.idle.set()
            self.backlog.finish_at = {}
            if self._refresh is not None:
                self._refresh.cancel()
                self._refresh = None

    def _with_others(self, finish_at: Mapping[str, float]) -> Mapping[str, float]:
        """An estimate of the backlog that may be that of one engine, and of the others the last."""
        if len(self._pool.engines) == 1:
            return finish_at
        last = self.backlog.finish_at
        return {
            model: max(finish_at.get(model, 0.0), last.get(model, 0.0))
            for model in finish_at.keys() | last.keys()
        }

    def _refresh_later(self, seconds: float) -> None:
        self._refresh = asyncio.get_running_loop().call_later(seconds, self._refresh_backlog)

    def _refresh_backlog(self) -> None:
        began = time.monotonic()
        self.backlog.finish_at = self._estimator.model_finish_at()
        cost = time.monotonic() - began
        self._refresh_later(max(REFRESH_SECONDS, cost / REFRESH_SHARE))

    def _watch_deadline(self, job: Job) -> None:
        if timer := self._deadlines.pop(job.id, None):
            timer.cancel()
        if job.deadline is not None:
            # ``time.monotonic`` is the clock of asyncio's loops.
            loop = asyncio.get_running_loop()
            self._deadlines[job.id] = loop.call_at(job.deadline, self._expire, job.id)

    def _check_estimate(self, active: ActiveJob, now: float) -> None:
        if (estimate := active.estimate) is not None:
            seconds = now - estimate.made_at
            self._estimator.record_actual(estimate, seconds)
            self._observer.on_event(EstimateChecked(active.job.model, estimate.total, seconds))

    def _set_positions(self, queue: Sequence[ActiveJob]) -> None:
        for position, active in enumerate(queue):
            if active.position != position:
                active.set_position(position)


def _lets_others_pass(active: ActiveJob) -> bool:
    """Whether a job has waited so little that others may take rows of batches before it."""
    if active.estimate is None:
        return False
    waited = time.monotonic() - active.job.submitted_at
    return waited <= PASSING_SHARE * active.estimate.run_time


def _has_time(active: ActiveJob) -> bool:
    deadline = active.job.deadline
    return deadline is None or deadline > time.monotonic()


def _result(active: ActiveJob, stages: StageSeconds) -> Finished | DarkroomError:
    images, count = active.images, active.job.image_count
    if len(images) != count:
        return outcomes.failed(Reason.INTERNAL, "the engine lost an image; try again")
    return Finished(tuple(images[index] for index in range(count)), stages)
