"""The state of jobs, for callers that do not follow them."""

import secrets
import time
from dataclasses import dataclass
from enum import StrEnum

from darkroom_server.core.errors import DarkroomError, InvalidRequest, Violation
from darkroom_server.dispatch import ActiveJob, JobOutcome, ResultStore
from darkroom_server.service.call_context import CallContext
from darkroom_server.service.idempotency import check_request_id

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000


class GenerationState(StrEnum):
    """How far a job is, or how it ended. RUNNING: an engine has it."""

    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


ENDS = {
    JobOutcome.FINISHED: GenerationState.FINISHED,
    JobOutcome.FAILED: GenerationState.FAILED,
    JobOutcome.EXPIRED: GenerationState.EXPIRED,
    JobOutcome.CANCELLED: GenerationState.CANCELLED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One job at one moment; ``age`` and ``estimated_finish`` in seconds.

    ``step`` of ``steps`` denoiser calls are done, of all images together. ``position``: the number
    of jobs ahead, None if it does not wait. ``age``: since the request arrived.
    ``estimated_finish``: from now, None if it is not known and for a job that ended. ``error``: why
    it ended without its images.
    """

    request_id: str
    state: GenerationState
    model: str
    image_count: int
    finished_images: int
    step: int
    steps: int
    position: int | None
    age: float
    estimated_finish: float | None
    error: DarkroomError | None


@dataclass(frozen=True, slots=True)
class GenerationPage:
    """Some of a caller's jobs, the last accepted first; ``next_token`` is "" on the last page."""

    generations: tuple[Generation, ...]
    next_token: str


class JobService:
    """Reports where the jobs of a caller are; does not subscribe to them.

    A page token has the name of this store: another server behind the same name would return other
    jobs for it.
    """

    def __init__(self, results: ResultStore) -> None:
        self._results = results
        self._store = secrets.token_hex(4)

    def get(self, call: CallContext, request_id: str) -> Generation:
        """The job of this caller; raises ``InvalidRequest`` or ``UnknownRequest``."""
        check_request_id(request_id)
        return _generation(request_id, self._results.find(call.caller.name, request_id))

    def page(self, call: CallContext, page_size: int, page_token: str) -> GenerationPage:
        """One page of this caller's jobs.

        ``page_size``: 0 for the default. ``page_token``: "" for the first page. Raises
        ``InvalidRequest``.
        """
        wrong, after = [], None
        if not 0 <= page_size <= MAX_PAGE_SIZE:
            rule = f"must be 1 to {MAX_PAGE_SIZE}, or 0 for {DEFAULT_PAGE_SIZE}, not {page_size}"
            wrong.append(Violation("page_size", rule))
        if page_token:
            after = self._end_of(page_token)
            if after is None:
                rule = "must be next_page_token of an earlier page, of the same server"
                wrong.append(Violation("page_token", rule))
        if wrong:
            raise InvalidRequest(wrong)
        page = self._results.page(call.caller.name, page_size or DEFAULT_PAGE_SIZE, after)
        return GenerationPage(
            tuple(_generation(request_id, active) for request_id, active in page.jobs),
            "" if page.end is None else f"{self._store}-{page.end}",
        )

    def _end_of(self, page_token: str) -> int | None:
        """The end of the page that had this token, None if no page of this store had it."""
        store, _, end = page_token.partition("-")
        valid = store == self._store and end.isascii() and end.isdecimal() and len(end) <= 18
        return int(end) if valid else None


def _generation(request_id: str, active: ActiveJob) -> Generation:
    now = time.monotonic()
    outcome = active.outcome
    running = GenerationState.RUNNING if active.assigned else GenerationState.QUEUED
    estimate = None if outcome else active.estimate
    return Generation(
        request_id=request_id,
        state=ENDS[outcome] if outcome else running,
        model=active.model.id,
        image_count=active.job.image_count,
        finished_images=active.finished_images,
        step=active.steps_done,
        steps=active.steps,
        position=None if outcome else active.position,
        age=now - active.job.submitted_at,
        estimated_finish=max(0.0, estimate.finish_at - now) if estimate else None,
        error=active.error,
    )
