"""One request in one record: for the log, and for whoever counts."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from darkroom_server.core.errors import (
    DarkroomError,
    DeadlineExceeded,
    InvalidRequest,
    JobCancelled,
    NotAllowed,
    Refused,
    RequestConflict,
    Unauthenticated,
    UnknownModel,
    UnknownRequest,
)
from darkroom_server.core.events import StageSeconds

UNKNOWN_MODEL = "unknown"
"""Stands for whatever a caller wrote that is no model of ours."""


class Outcome(StrEnum):
    """How a request ended."""

    FINISHED = "finished"
    INVALID = "invalid"
    REFUSED = "refused"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(slots=True)
class RequestSummary:
    """What became of one ``Generate`` call; ``seconds`` from arrival to answer.

    ``images`` were asked for (0 where that was not understood), ``flagged`` of them withheld.
    """

    model: str = UNKNOWN_MODEL
    outcome: Outcome = Outcome.FAILED
    reason: str = ""
    images: int = 0
    flagged: int = 0
    seconds: float = 0.0
    stages: StageSeconds | None = None


class RequestObserver(Protocol):
    """Is told of every request that ended, on the event loop."""

    def request_ended(self, summary: RequestSummary) -> None:
        """Count it; returns at once and never raises."""


def outcome_of(error: DarkroomError) -> Outcome:
    """The outcome of a request that ended with ``error``."""
    match error:
        case InvalidRequest() | UnknownModel() | UnknownRequest() | RequestConflict():
            return Outcome.INVALID
        case Refused() | Unauthenticated() | NotAllowed():
            return Outcome.REFUSED
        case JobCancelled():
            return Outcome.CANCELLED
        case DeadlineExceeded():
            return Outcome.EXPIRED
    return Outcome.FAILED
