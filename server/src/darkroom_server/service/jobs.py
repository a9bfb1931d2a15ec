"""The state of jobs, for callers that do not follow them."""

import heapq
import secrets
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

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


class RecordedJobs(Protocol):
    """The jobs of a ledger that servers share, wherever they run."""

    async def page(
        self, caller: str, most: int, before: int | None
    ) -> list[tuple[int, Generation]]:
        """At most ``most`` jobs of a caller, the last accepted first, each with its number.

        ``before``: only those with a smaller number. Raises ``LedgerUnreachable``.
        """


class JobService:
    """Reports where the jobs of a caller are; does not subscribe to them.

    A page token has the name of this store: another server behind the same name would return other
    jobs for it, unless both share a ledger.
    """

    def __init__(self, results: ResultStore) -> None:
        self._results = results
        self._store = secrets.token_hex(4)

    def get(self, call: CallContext, request_id: str) -> Generation:
        """The job of this caller; raises ``InvalidRequest`` or ``UnknownRequest``."""
        check_request_id(request_id)
        return generation_of(request_id, self._results.find(call.caller.name, request_id))

    async def page(
        self, call: CallContext, page_size: int, page_token: str, shared: RecordedJobs | None
    ) -> GenerationPage:
        """One page of this caller's jobs; those of a ``shared`` ledger wherever they are.

        ``page_size``: 0 for the default. ``page_token``: "" for the first page. Raises
        ``InvalidRequest``, and what ``ResultStore.page`` and ``RecordedJobs.page`` raise.
        """
        wrong, after = [], _Cursor()
        if not 0 <= page_size <= MAX_PAGE_SIZE:
            rule = f"must be 1 to {MAX_PAGE_SIZE}, or 0 for {DEFAULT_PAGE_SIZE}, not {page_size}"
            wrong.append(Violation("page_size", rule))
        if page_token:
            found = self._cursor_of(page_token, any_server=shared is not None)
            if found is None:
                rule = "must be next_page_token of an earlier page, of the same server"
                wrong.append(Violation("page_token", rule))
            else:
                after = found
        if wrong:
            raise InvalidRequest(wrong)
        caller, size = call.caller.name, page_size or DEFAULT_PAGE_SIZE
        here = self._results.page(caller, size + 1, after.serial, unrecorded=shared is not None)
        jobs = [(_Cursor(serial=serial), generation_of(id, active)) for serial, id, active in here]
        if shared is not None:
            recorded = await shared.page(caller, size + 1, after.number)
            there = [(_Cursor(number=number), each) for number, each in recorded]
            jobs = list(heapq.merge(jobs, there, key=lambda pair: pair[1].age))
        shown = jobs[:size]
        for cursor, _ in shown:
            after = after.moved_to(cursor)
        return GenerationPage(
            tuple(generation for _, generation in shown),
            self._token_of(after) if len(jobs) > size else "",
        )

    def _token_of(self, cursor: "_Cursor") -> str:
        numbers = (cursor.serial, cursor.number)
        return "-".join([self._store, *("" if each is None else str(each) for each in numbers)])

    def _cursor_of(self, page_token: str, *, any_server: bool) -> "_Cursor | None":
        """Where the page ended that had this token; None if no page had it."""
        store, *numbers = page_token.split("-")
        if len(numbers) != 2 or not all(map(_is_number, numbers)):
            return None
        serial, number = (int(each) if each else None for each in numbers)
        if store == self._store:
            return _Cursor(serial, number)
        # What another server does not have in the ledger, only that one lists.
        return _Cursor(0, number) if any_server else None


@dataclass(frozen=True, slots=True)
class _Cursor:
    """After which job a page begins: its number in this store, and in the ledger."""

    serial: int | None = None
    number: int | None = None

    def moved_to(self, shown: "_Cursor") -> "_Cursor":
        """After a job that was shown, too."""
        return _Cursor(shown.serial or self.serial, shown.number or self.number)


def _is_number(text: str) -> bool:
    return not text or (text.isascii() and text.isdecimal() and len(text) <= 18)


def generation_of(request_id: str, active: ActiveJob) -> Generation:
    """The state of a job that is here."""
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
