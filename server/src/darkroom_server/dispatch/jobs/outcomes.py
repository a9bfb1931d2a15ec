"""What a caller is told at the end of a job: which of the four ends it is, and the answer."""

from collections import Counter
from enum import StrEnum

from darkroom_server.core import errors
from darkroom_server.core.errors import (
    DarkroomError,
    DeadlineExceeded,
    Failure,
    GenerationFailed,
    Reason,
)
from darkroom_server.core.events import JobCancelled, StageSeconds
from darkroom_server.dispatch.jobs.job import ActiveJob, Finished


class JobOutcome(StrEnum):
    """How an accepted job ended, as its caller saw it."""

    FINISHED = "finished"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


class Counts:
    """Jobs accepted and ended since the start: ``accepted == ended + live``, always."""

    def __init__(self) -> None:
        self.accepted = 0
        self.by_end: Counter[JobOutcome] = Counter()

    @property
    def ended(self) -> int:
        """Jobs that ended, in whatever way."""
        return self.by_end.total()

    @property
    def live(self) -> int:
        """Jobs whose callers still wait."""
        return self.accepted - self.ended


Outcome = tuple[JobOutcome, Finished | DarkroomError]


def finished(accepted: ActiveJob, stages: StageSeconds) -> Outcome:
    """The engine drew every image."""
    count = accepted.job.image_count
    if len(accepted.images) != count:
        return _failed(Reason.INTERNAL, "the engine lost an image; try again")
    images = tuple(accepted.images[index] for index in range(count))
    return JobOutcome.FINISHED, Finished(images, stages)


def failed(failure: Failure) -> Outcome:
    """The engine gave the job up."""
    return JobOutcome.FAILED, GenerationFailed(failure)


def dropped(event: JobCancelled) -> Outcome:
    """The engine let go of a job that its caller still wants."""
    if event.expired:
        return expired(begun=True)
    return _failed(Reason.ENGINE_FAILED, "the engine dropped the job; try again")


def cancelled() -> Outcome:
    """Nobody wants it any more, or somebody said so."""
    return JobOutcome.CANCELLED, errors.JobCancelled("the generation was cancelled")


def expired(*, begun: bool) -> Outcome:
    """The deadline passed, and an engine had it by then or not."""
    when = "finished" if begun else "begun"
    return JobOutcome.EXPIRED, DeadlineExceeded(f"the deadline passed before it was {when}")


def after_crash(accepted: ActiveJob, *, last: bool) -> Outcome | None:
    """The end of a job whose engine died, None where it is run again; ``last``: none is left."""
    if accepted.ended or last:
        return stopped()
    if accepted.crashes > 1:
        return _failed(
            Reason.ENGINE_CRASHED,
            "the engine crashed twice while it drew this, and does not try again; change the "
            "request",
        )
    if len(accepted.images) == accepted.job.image_count:
        # It died with nothing left to draw; where the time went, it took along.
        return finished(accepted, StageSeconds())
    return None


def stopped() -> Outcome:
    """No engine will come back."""
    return _failed(Reason.ENGINE_FAILED, "the engine stopped; try again")


def _failed(reason: Reason, message: str) -> Outcome:
    return failed(Failure(reason, message))
