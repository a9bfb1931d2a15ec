"""Generating images: the use case behind every door."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from darkroom_server.core.errors import (
    InvalidRequest,
    LedgerUnreachable,
    UnknownRequest,
    Violation,
)
from darkroom_server.core.job import Job
from darkroom_server.core.ledger import Key
from darkroom_server.core.model import ModelInfo
from darkroom_server.dispatch import (
    ActiveJob,
    ConcurrentCallLimiter,
    Dispatcher,
    Estimate,
    LedgerEntries,
    ResultStore,
    RunsElsewhere,
)
from darkroom_server.service.call_context import REQUEST_ID, CallContext
from darkroom_server.service.detached import DetachedJobs
from darkroom_server.service.durability import Durability
from darkroom_server.service.fleet import Fleet, WaitingJobs
from darkroom_server.service.idempotency import check_request_id, fingerprint
from darkroom_server.service.input_fields import check_adapters
from darkroom_server.service.inputs import InputLoader
from darkroom_server.service.jobs import Generation, GenerationPage, JobService
from darkroom_server.service.request import GenerationRequest, Inputs
from darkroom_server.service.stored_request import RequestCodec
from darkroom_server.service.summary import RequestObserver, RequestSummary, Summaries
from darkroom_server.service.validation import ReplyLimit, job_of

MAX_TIME_LIMIT_SECONDS = 366 * 86400.0


@dataclass(frozen=True, slots=True)
class RequestEstimate:
    """What a request would take now; ``time`` is None while too little is known."""

    time: Estimate | None
    peak_bytes: int
    available_bytes: int


class GenerationService:
    """Validates requests, submits or joins their jobs, and records one summary for each call.

    ``observers`` receive the summaries. A job that must outlive its call has an entry in the ledger
    of ``entries``, with its request as ``codec`` stores it, before its caller gets an answer. In a
    fleet, so has any job that waits for room or whose caller has a quota. All methods belong to the
    dispatcher's event loop.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        results: ResultStore,
        inputs: InputLoader,
        observers: Sequence[RequestObserver],
        entries: LedgerEntries,
        codec: RequestCodec,
        *,
        log_prompts: bool = False,
    ) -> None:
        self.summaries = Summaries(observers, log_prompts=log_prompts)
        self.jobs = JobService(results)
        self._dispatcher = dispatcher
        self._results = results
        self._inputs = inputs
        self._open_calls = ConcurrentCallLimiter(dispatcher.max_jobs)
        self._entries = entries
        self._detached = DetachedJobs(self.summaries)
        self.durability = Durability(entries, codec, dispatcher, results, inputs, self._detached)
        self._keeps_jobs = self.durability.durable
        self._fleet: Fleet | None = None
        self._waiting: WaitingJobs | None = None

    def share(self, fleet: Fleet) -> None:
        """Answer for the jobs of other servers too, from now on."""
        self._fleet = fleet
        self._waiting = WaitingJobs(fleet, self._entries)
        self.durability.shared = True

    async def resolve(self, asked: str) -> str:
        """The id of the model that a request means; "" means the only one.

        One that is not known is looked for. Raises what ``Availability.resolve`` raises.
        """
        availability = self._dispatcher.availability
        if asked and availability.models.get(asked) is None:
            await self._dispatcher.models.find(asked)
        return availability.resolve(asked)

    def open_call(self, call: CallContext, request_id: str) -> Callable[[], None]:
        """Count a call that follows the job ``request_id``; call the result when it is over.

        Raises ``QuotaExceeded``.
        """
        return self._open_calls.acquire(call.caller, request_id)

    async def accept(
        self,
        request: GenerationRequest,
        call: CallContext,
        summary: RequestSummary,
        *,
        deadline: float | None,
        idempotent: bool,
        detached: bool = False,
        reply_limit: ReplyLimit | None = None,
    ) -> tuple[ActiveJob, bool]:
        """The job for ``request``, and whether it joined one that an earlier call began.

        ``deadline`` is in ``time.monotonic`` seconds. ``idempotent``: the caller knows the request
        id, and a call with the same id joins. ``detached``: the job runs whether or not a call
        follows it. ``reply_limit``: the limit of a reply in one message. Raises ``InvalidRequest``
        with all violations, ``RequestConflict``, ``LedgerUnreachable``, and what ``InputLoader``
        and ``Dispatcher.submit`` raise. The images of a request that joins are not looked at.
        """
        request_id = request_id_of(request, call)
        digest = fingerprint(request) if idempotent else b""
        active = None
        files: dict[str, bytes] = {}
        if idempotent:
            active = self._join(request, call, request_id, digest, deadline)
        if active is None:
            summary.model = model_id = await self.resolve(request.model)
            model = self._dispatcher.availability.model(model_id)
            job = job_of(
                request,
                model,
                call,
                job_id=request_id,
                submitted_at=summary.arrived,
                deadline=deadline,
            )
            if request.inputs is not None:
                self._check_adapters(request.inputs, model)
                files = self._inputs.files(request, call.caller)
                job = await self._inputs.attach(job, request, model, call.caller, files)
                if idempotent:  # Another call with this id may have begun the job meanwhile.
                    active = self._join(request, call, request_id, digest, deadline)
        joined = active is not None
        durable = detached or (self._keeps_jobs and idempotent and request.keep)
        # Counted over the fleet; else as long as there is room, a plain job stays off the ledger.
        recorded = durable or (self._fleet is not None and call.caller.max_jobs is not None)
        if active is None:
            if reply_limit is not None:
                reply_limit.check(job)
            summary.images, summary.steps = job.image_count, job.steps
            if self._waiting is not None and not self._dispatcher.has_room(job, model):
                queued = await self._queue(
                    job, request, call, digest, files, detached=detached, plain=not durable
                )
                if queued is not None:
                    summary.accepted(queued[0])
                    return queued
                recorded = False
                if idempotent:  # As above.
                    active = self._join(request, call, request_id, digest, deadline)
                    joined = active is not None
            if active is None and (idempotent or recorded):
                keep = idempotent and request.keep
                active = self._results.submit(
                    job, call.caller, request_id, digest, keep=keep, named=idempotent
                )
            elif active is None:
                active = self._dispatcher.submit(job, call.caller)
        elif active.images_lost:
            key = Key(call.caller.name, request_id)
            active = await self.durability.again(active, key, call)
        summary.accepted(active)
        if detached:
            self._results.detach(active)
        if durable or (_is_of_another_server(active) if joined else recorded):
            self._record(
                request,
                call,
                active,
                digest,
                files,
                detached=detached,
                plain=not durable,
                joined=joined,
            )
        if active.recording is not None:
            try:
                await _recorded(active, active.recording)
            except RunsElsewhere as elsewhere:
                if self._fleet is None or call.relayed:
                    raise UnknownRequest(request_id) from None
                active, joined = await self._fleet.follow(elsewhere.entry), True
                summary.accepted(active)
        if joined and reply_limit is not None:
            reply_limit.check(active.job)  # The call that began it may accept more, or streams.
        return active, joined

    async def _queue(
        self,
        job: Job,
        request: GenerationRequest,
        call: CallContext,
        digest: bytes,
        files: dict[str, bytes],
        *,
        detached: bool,
        plain: bool,
    ) -> tuple[ActiveJob, bool] | None:
        """Accept a job that no engine here takes at once: the first server with room runs it.

        None if the ledger is away and the job is ``plain``: it waits here, as without a fleet.
        """
        assert self._waiting is not None
        active = self._dispatcher.check(job, call.caller)
        key = Key(call.caller.name, request_id_of(request, call))
        draft = self.durability.draft(
            request, call, key, active, digest, files, detached=detached, plain=plain
        )
        try:
            return await self._waiting.put(active, draft)
        except LedgerUnreachable:
            if not plain:
                raise
            return None

    def _record(
        self,
        request: GenerationRequest,
        call: CallContext,
        active: ActiveJob,
        digest: bytes,
        files: dict[str, bytes],
        *,
        detached: bool,
        plain: bool,
        joined: bool,
    ) -> None:
        """Write the job into the ledger, or what this call changes of its entry."""
        if active.entry is not None and active.ended:
            return
        if plain or not self._keeps_jobs:
            files = {}  # Nobody takes the job up after this server.
        elif joined and (active.entry is None or active.entry.plain):
            files = self._inputs.files(request, call.caller)
        key = Key(call.caller.name, request_id_of(request, call))
        draft = self.durability.draft(
            request, call, key, active, digest, files, detached=detached, plain=plain
        )
        self._results.record(active, draft, joined=joined)

    def _join(
        self,
        request: GenerationRequest,
        call: CallContext,
        request_id: str,
        digest: bytes,
        deadline: float | None,
    ) -> ActiveJob | None:
        """The job that an earlier call with this id began, None if there is none."""
        return self._results.join(call.caller, request_id, digest, deadline, keep=request.keep)

    async def submit(
        self,
        request: GenerationRequest,
        call: CallContext,
        *,
        arrived: float,
        time_limit: float | None,
    ) -> tuple[ActiveJob, bool]:
        """As ``accept``, for a job that runs whether or not a call follows it.

        ``time_limit``: seconds until the job expires, None for never. Its summary is recorded when
        it ends.
        """
        with self.summaries.record(request, call, arrived, deadline=None) as summary:
            deadline = _deadline_after(time_limit)
            active, joined = await self.accept(
                request, call, summary, deadline=deadline, idempotent=True, detached=True
            )
            summary.continues = True
        if not joined and active.entry is not None:  # Else the server that runs it does.
            self._detached.record(request, call, arrived, active)
        return active, joined

    async def find(self, call: CallContext, request_id: str) -> ActiveJob:
        """The job of this caller; it runs again if its images are gone with an earlier server.

        Raises ``InvalidRequest``, what ``ResultStore.find`` and ``Durability.again`` raise.
        """
        check_request_id(request_id)
        if await self._is_elsewhere(call, request_id):
            assert self._fleet is not None
            return await self._fleet.find(Key(call.caller.name, request_id))
        active = self._results.find(call.caller.name, request_id)
        if active.images_lost:
            key = Key(call.caller.name, request_id)
            active = await self.durability.again(active, key, call)
        return active

    async def get(self, call: CallContext, request_id: str) -> Generation:
        """Where the job of this caller is; raises as ``cancel``."""
        check_request_id(request_id)
        if await self._is_elsewhere(call, request_id):
            assert self._fleet is not None
            return await self._fleet.generation(Key(call.caller.name, request_id))
        return self.jobs.get(call, request_id)

    async def page(self, call: CallContext, page_size: int, page_token: str) -> GenerationPage:
        """One page of this caller's jobs; as ``JobService.page``."""
        shared = None if call.relayed else self._fleet
        return await self.jobs.page(call, page_size, page_token, shared)

    async def _is_elsewhere(self, call: CallContext, request_id: str) -> bool:
        """Whether another server of the ledger may have the job, and this call may go there."""
        if self._fleet is None or call.relayed:
            return False
        return await self._results.agreed(Key(call.caller.name, request_id)) is None

    async def cancel(self, call: CallContext, request_id: str) -> bool:
        """Cancel a job of this caller; False if it had ended.

        Raises ``InvalidRequest``, ``LedgerUnreachable``, and what ``ResultStore.find`` raises.
        """
        check_request_id(request_id)
        if await self._is_elsewhere(call, request_id):
            assert self._fleet is not None
            return await self._fleet.cancel(Key(call.caller.name, request_id))
        active = self._results.find(call.caller.name, request_id)
        cancelled = self._results.cancel(call.caller.name, request_id)
        await self._entries.settled(active)
        return cancelled

    async def estimate(self, request: GenerationRequest, call: CallContext) -> RequestEstimate:
        """What ``request`` would take now, without running it.

        Raises what the request itself would raise, except for quotas, queue limits and deadlines.
        """
        availability = self._dispatcher.availability
        model = availability.model(await self.resolve(request.model))
        job = job_of(request, model, call, job_id="", submitted_at=time.monotonic(), deadline=None)
        if request.inputs is not None:
            self._check_adapters(request.inputs, model)
            files = self._inputs.files(request, call.caller)
            job = await self._inputs.attach(job, request, model, call.caller, files)
        # The images of the job share a batch, as far as they fit.
        most = model.rows_of_a_pass(*job.denoised_size)
        rows = min(model.rows_per_image(job) * job.image_count, most)
        return RequestEstimate(
            time=self._dispatcher.estimate(job),
            peak_bytes=model.needed_by_rows(job, rows) + job.image_count * model.held_bytes(job),
            available_bytes=model.memory.available_bytes,
        )

    def _check_adapters(self, inputs: Inputs, model: ModelInfo) -> None:
        """Raise ``UnknownAdapter``, or ``InvalidRequest`` for one that ``model`` does not take."""
        if not (inputs.loras or inputs.controls):
            return
        known = self._dispatcher.availability.adapters
        if violations := check_adapters(inputs, model, known):
            raise InvalidRequest(violations)


def _is_of_another_server(active: ActiveJob) -> bool:
    """Whether a job here is plain, and only calls of another server were known to follow it."""
    return active.entry is not None and not active.entry.plain and active.entry.calls_at is not None


def request_id_of(request: GenerationRequest, call: CallContext) -> str:
    """The request's own id if it can be used, else that of its call."""
    return request.request_id if REQUEST_ID.fullmatch(request.request_id) else call.request_id


async def _recorded(active: ActiveJob, recording: "asyncio.Task[None]") -> None:
    """Wait until a job is in the ledger; raises why it cannot be."""
    try:
        await asyncio.shield(recording)
    except asyncio.CancelledError:
        with active.subscribe():
            pass  # As a call that disconnects later.
        raise


def _deadline_after(time_limit: float | None) -> float | None:
    if time_limit is None:
        return None
    if not 0 < time_limit < MAX_TIME_LIMIT_SECONDS:
        raise InvalidRequest([Violation("time_limit", "must be more than nothing, at most a year")])
    return time.monotonic() + time_limit
