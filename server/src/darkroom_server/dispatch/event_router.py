"""What engines tell, passed on: their counts to the observer, the rest to the jobs it is about."""

import time
from collections.abc import Callable

from darkroom_server.core.events import (
    BatchDone,
    DecodeDone,
    EngineCounts,
    EngineDied,
    EngineReady,
    Event,
    ImageReady,
    JobCancelled,
    JobFailed,
    JobFinished,
    JobStarted,
    JobTaken,
    MemoryReport,
    PeakMeasured,
    PreviewReady,
    SampleProgress,
)
from darkroom_server.dispatch.admission.estimator import Estimator
from darkroom_server.dispatch.jobs import outcomes
from darkroom_server.dispatch.jobs.job import ActiveJob
from darkroom_server.dispatch.jobs.registry import JobRegistry
from darkroom_server.dispatch.observer import Observer


class EventRouter:
    """Hears the engines, on the event loop; what is told of a job that has left is dropped.

    ``on_leave`` is told of each job that its engine has let go, and how it ended there;
    ``on_return`` of one that was let go too early, and is to be run again.
    """

    def __init__(
        self,
        roster: JobRegistry,
        observer: Observer,
        estimates: Estimator,
        on_leave: Callable[[ActiveJob, outcomes.Outcome], None],
        on_return: Callable[[ActiveJob], None],
    ) -> None:
        self._roster = roster
        self._observer = observer
        self._estimates = estimates
        self._on_leave = on_leave
        self._on_return = on_return

    def hear(self, event: Event) -> None:
        """Pass ``event`` on."""
        match event:
            case BatchDone():
                self._observer.batch_done(event)
            case EngineCounts():
                self._observer.counted(event)
            case PeakMeasured():
                self._observer.peak(event)
            case MemoryReport():
                self._observer.memory(event)
            case EngineReady() | EngineDied() | DecodeDone():
                pass  # The fleet's.
            case _:
                if accepted := self._roster.get(event.job_id):
                    self._hear_of(accepted, event)

    def _hear_of(self, accepted: ActiveJob, event: Event) -> None:
        match event:
            case JobTaken():
                accepted.taken = True
            case JobStarted():
                accepted.starts()
            case SampleProgress():
                accepted.steps(event)
            case PreviewReady():
                self._previewed(accepted, event)
            case ImageReady():
                accepted.draws(event.image_index, event.image)
            case JobFinished(_, stages):
                self._compare(accepted)
                self._on_leave(accepted, outcomes.finished(accepted, stages))
            case JobFailed(_, failure):
                self._on_leave(accepted, outcomes.failed(failure))
            case JobCancelled():
                self._observer.wasted(accepted.job.model, event.wasted_seconds)
                if event.expired and _has_time(accepted):
                    self._on_return(accepted)
                else:
                    self._on_leave(accepted, outcomes.dropped(event))

    def _previewed(self, accepted: ActiveJob, preview: PreviewReady) -> None:
        if not accepted.previewed:
            seconds = time.monotonic() - accepted.job.submitted_at
            self._observer.previewed(accepted.job.model, seconds)
        accepted.previewed = True
        accepted.tell(preview)

    def _compare(self, accepted: ActiveJob) -> None:
        """Tell how good the estimate of a finished job was; of one run again it says nothing."""
        estimate = accepted.estimate
        if estimate is not None and not accepted.ended:
            seconds = time.monotonic() - estimate.made_at
            self._estimates.record_actual(estimate, seconds)
            self._observer.estimated(accepted.job.model, estimate.total, seconds)


def _has_time(accepted: ActiveJob) -> bool:
    """Whether the job may go on: a caller that joined it brought a deadline later than its own.

    The engine may hear of that when it has let the job go already.
    """
    deadline = accepted.job.deadline
    return not accepted.ended and (deadline is None or deadline > time.monotonic())
