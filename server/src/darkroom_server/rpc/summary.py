"""One request in one record: for the log, and for whoever counts."""

import asyncio
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import structlog

from darkroom.v1 import generation_pb2
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
from darkroom_server.dispatch import ActiveJob, Finished
from darkroom_server.rpc.context import Context, has_expired
from darkroom_server.rpc.request_id import current_request_id
from darkroom_server.rpc.trace_context import TraceContext, current_trace

log = structlog.get_logger(__name__)

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
    """What became of one call that asked for images; ``seconds`` from arrival to answer.

    ``images`` were asked for (0 where that was not understood, or another call asked before),
    ``flagged`` of them withheld, each of so many ``steps``; ``rows`` shared the last pass of the
    one in most company. ``phase`` is how far it was where it did not finish, "" for what was never
    accepted. ``goes_on``: the end is not known yet, and somebody else waits.
    """

    model: str = UNKNOWN_MODEL
    outcome: Outcome = Outcome.FAILED
    reason: str = ""
    images: int = 0
    flagged: int = 0
    steps: int = 0
    rows: int = 0
    seconds: float = 0.0
    goes_on: bool = False
    phase: str = ""
    stages: StageSeconds | None = None
    # Not the job itself: it holds images, and is let go of when its reader stalls.
    _job: "weakref.ref[ActiveJob] | None" = None
    request_id: str = field(default_factory=current_request_id)
    trace: TraceContext | None = field(default_factory=current_trace)

    def asks_for(self, accepted: ActiveJob) -> None:
        """The request was accepted as this job."""
        self.model = accepted.model.id
        self._job = weakref.ref(accepted)

    def ended_early(self) -> None:
        """Note how far the job was."""
        accepted = self._job() if self._job else None
        if accepted is not None:
            self.phase = accepted.phase

    def finished(self, finished: Finished) -> None:
        """Every image was drawn."""
        self.outcome = Outcome.FINISHED
        if self.images:
            self.stages = finished.stages
            self.flagged = sum(image.flagged for image in finished.images)
            self.rows = max(image.replay.rows_in_last_pass for image in finished.images)


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


class Summaries:
    """Leaves one line in the log and one record with ``observer`` for every call."""

    def __init__(self, observer: RequestObserver, *, log_prompts: bool = False) -> None:
        self._observer = observer
        self._log_prompts = log_prompts

    @contextmanager
    def of(
        self, request: generation_pb2.GenerateRequest, context: Context, arrived: float
    ) -> Iterator[RequestSummary]:
        """Note how the block ends, whichever way it does."""
        summary = RequestSummary()
        try:
            yield summary
        except DarkroomError as error:
            summary.outcome = outcome_of(error)
            summary.reason = error.reason
            raise
        except (asyncio.CancelledError, GeneratorExit):
            summary.outcome = Outcome.EXPIRED if has_expired(context) else Outcome.CANCELLED
            raise
        finally:
            summary.seconds = time.monotonic() - arrived
            if summary.outcome is not Outcome.FINISHED:
                summary.ended_early()
            if not summary.goes_on:
                self._observer.request_ended(summary)
                self._log(summary, request)

    def _log(self, summary: RequestSummary, request: generation_pb2.GenerateRequest) -> None:
        fields: dict[str, Any] = {
            "model": summary.model,
            "outcome": summary.outcome.value,
            "images": summary.images,
            "seconds": round(summary.seconds, 4),
        }
        if summary.reason:
            fields["reason"] = str(summary.reason)
        if summary.phase:
            fields["phase"] = summary.phase
        if summary.flagged:
            fields["flagged"] = summary.flagged
        if summary.rows:
            fields |= {"steps": summary.steps, "rows": summary.rows}
        if summary.stages is not None:
            fields["stages"] = {k: round(v, 4) for k, v in asdict(summary.stages).items()}
        if self._log_prompts:
            fields["prompt"] = request.prompt
            fields["negative_prompt"] = request.negative_prompt
        log.info("request", **fields)
