"""One summary for each request: for the log and the metrics."""

import asyncio
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Protocol

import structlog

from darkroom_server.core.errors import (
    AdapterUnusable,
    DarkroomError,
    DeadlineExceeded,
    DeadlineUnreachable,
    GenerationFailed,
    InvalidRequest,
    JobCancelled,
    ModelMemory,
    ModelUnusable,
    NotAllowed,
    Reason,
    Refused,
    RequestConflict,
    Unauthenticated,
    UnknownAdapter,
    UnknownModel,
    UnknownRequest,
    UploadNotFound,
)
from darkroom_server.core.events import StageSeconds
from darkroom_server.core.job import DEADLINE_SLACK_SECONDS, PROMPT_FIELDS
from darkroom_server.dispatch import ActiveJob, Finished
from darkroom_server.service.call_context import CallContext
from darkroom_server.service.request import GenerationRequest
from darkroom_server.service.trace_context import TraceContext

log = structlog.get_logger(__name__)

UNKNOWN_MODEL = "unknown"
"""The label for every name that is not a model of this server."""


class Outcome(StrEnum):
    """How a request ended."""

    FINISHED = "finished"
    INVALID = "invalid"
    REFUSED = "refused"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(slots=True, kw_only=True)
class RequestSummary:
    """What became of one call that asked for images; ``seconds`` from ``arrived`` to the answer.

    ``images``: those asked for, 0 if the request was not understood or another call asked first;
    ``flagged`` of them were withheld. ``rows``: the most rows of a batch in which one of them took
    its last step. ``phase``: how far an accepted job was if it did not finish. ``continues``: the
    job goes on after this call, and its summary follows.
    """

    arrived: float
    request_id: str
    trace: TraceContext | None = None
    protocol: str = "grpc"
    model: str = UNKNOWN_MODEL
    outcome: Outcome = Outcome.FAILED
    reason: str = ""
    images: int = 0
    flagged: int = 0
    steps: int = 0
    rows: int = 0
    seconds: float = 0.0
    phase: str = ""
    stages: StageSeconds | None = None
    continues: bool = False
    # A weak reference: the job holds images, and is released if its reader stalls.
    _job: "weakref.ref[ActiveJob] | None" = None

    def accepted(self, active: ActiveJob) -> None:
        """The request was accepted as this job."""
        self.model = active.model.id
        self._job = weakref.ref(active)

    def set_phase(self) -> None:
        """Note how far the job is."""
        active = self._job() if self._job else None
        if active is not None:
            self.phase = active.phase

    def finished(self, finished: Finished) -> None:
        """The job finished with all its images."""
        self.outcome = Outcome.FINISHED
        if self.images:
            self.stages = finished.stages
            self.flagged = sum(image.flagged for image in finished.images)
            self.rows = max(image.replay.rows_in_last_pass for image in finished.images)


class RequestObserver(Protocol):
    """Receives the summary of every request, on the event loop."""

    def request_ended(self, summary: RequestSummary) -> None:
        """Record it, without blocking and without raising."""


def outcome_of(error: DarkroomError) -> Outcome:
    """The outcome of a request that ended with ``error``."""
    match error:
        case (
            InvalidRequest()
            | UnknownAdapter()
            | UnknownModel()
            | UnknownRequest()
            | AdapterUnusable()
            | UploadNotFound()
            | RequestConflict()
        ):
            return Outcome.INVALID
        case GenerationFailed(reason=Reason.INVALID_REQUEST):  # Only the engine could find out.
            return Outcome.INVALID
        case (
            Refused()
            | DeadlineUnreachable()
            | Unauthenticated()
            | NotAllowed()
            | ModelUnusable()
            | ModelMemory()
        ):
            return Outcome.REFUSED
        case JobCancelled():
            return Outcome.CANCELLED
        case DeadlineExceeded():
            return Outcome.EXPIRED
    return Outcome.FAILED


def _is_past(deadline: float | None) -> bool:
    return deadline is not None and deadline - time.monotonic() <= DEADLINE_SLACK_SECONDS


class Summaries:
    """Writes one log line for each request, and sends one summary to each observer."""

    def __init__(self, observers: Sequence[RequestObserver], *, log_prompts: bool = False) -> None:
        self._observers = observers
        self._log_prompts = log_prompts

    @contextmanager
    def record(
        self,
        request: GenerationRequest,
        call: CallContext,
        arrived: float,
        deadline: float | None,
    ) -> Iterator[RequestSummary]:
        """Record how the block ends. ``arrived``, ``deadline``: ``time.monotonic`` seconds."""
        summary = RequestSummary(
            arrived=arrived,
            request_id=call.request_id,
            trace=call.trace,
            protocol=call.protocol,
        )
        try:
            yield summary
        except DarkroomError as error:
            summary.outcome = outcome_of(error)
            summary.reason = error.reason
            raise
        except (asyncio.CancelledError, GeneratorExit):
            # A call that ends after its whole answer was sent changes nothing.
            if summary.outcome is not Outcome.FINISHED:
                summary.outcome = Outcome.EXPIRED if _is_past(deadline) else Outcome.CANCELLED
            raise
        finally:
            summary.seconds = time.monotonic() - arrived
            if summary.outcome is not Outcome.FINISHED:
                summary.set_phase()
            if not summary.continues:
                for observer in self._observers:
                    observer.request_ended(summary)
                self._log(summary, request)

    def _log(self, summary: RequestSummary, request: GenerationRequest) -> None:
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
            texts = {name: getattr(request, name) for name in PROMPT_FIELDS}
            always = ("prompt", "negative_prompt")
            fields |= {name: text for name, text in texts.items() if text or name in always}
        log.info("request", **fields)
