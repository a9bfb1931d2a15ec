"""How jobs end: the four outcomes, and what their callers receive."""

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum

from darkroom_server.core import errors
from darkroom_server.core.errors import (
    DeadlineExceeded,
    Failure,
    GenerationFailed,
    NotReady,
    Reason,
)
from darkroom_server.core.events import StageSeconds
from darkroom_server.core.finished_image import FinishedImage

MOVED_RETRY_SECONDS = 0.1
"""The next call finds the job at its server."""


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
        """Jobs that ended, in any way."""
        return self.by_end.total()

    @property
    def live(self) -> int:
        """Jobs that have not ended."""
        return self.accepted - self.ended


@dataclass(frozen=True, slots=True)
class Finished:
    """The result of a finished job: its images in order, and where the time went."""

    images: tuple[FinishedImage, ...]
    stages: StageSeconds


def failed(reason: Reason, message: str) -> GenerationFailed:
    """The server or its engine failed the job."""
    return GenerationFailed(Failure(reason, message))


def cancelled() -> errors.JobCancelled:
    """A caller cancelled the job, or its last caller disconnected."""
    return errors.JobCancelled("the generation was cancelled")


def expired(*, begun: bool) -> DeadlineExceeded:
    """The deadline passed; ``begun``: an engine had the job by then."""
    when = "finished" if begun else "begun"
    return DeadlineExceeded(f"the deadline passed before it was {when}")


def moved() -> NotReady:
    """This server was believed dead, so another one has the job by now."""
    return NotReady(
        "this server was cut off from the ledger, and another one has the job; watch it again",
        Reason.DRAINING,
        MOVED_RETRY_SECONDS,
    )


def crashed_twice() -> GenerationFailed:
    """A poison job: two engines died while it ran."""
    return failed(
        Reason.ENGINE_CRASHED,
        "the engine crashed twice while it generated this, and does not try again; change the "
        "request",
    )


def stopped() -> GenerationFailed:
    """No engine will come back."""
    return failed(Reason.ENGINE_FAILED, "the engine stopped; try again")
