"""Jobs and the ledger: what is stored of a request, and taking it up again after a restart."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace

import structlog

from darkroom_server.core.caller import ANONYMOUS, Caller
from darkroom_server.core.errors import (
    DarkroomError,
    DeadlineExceeded,
    Failure,
    GenerationFailed,
    JobCancelled,
    LedgerUnreachable,
    NotReady,
    Reason,
    UnknownRequest,
    UploadNotFound,
)
from darkroom_server.core.events import StageSeconds
from darkroom_server.core.job import Job
from darkroom_server.core.ledger import Draft, Entry, Key, Standing
from darkroom_server.core.model import ModelInfo
from darkroom_server.core.offers import needs_of, offers_of
from darkroom_server.dispatch import (
    ActiveJob,
    Dispatcher,
    Finished,
    LedgerEntries,
    ResultStore,
    counted_as,
)
from darkroom_server.service.call_context import CallContext
from darkroom_server.service.detached import DetachedJobs
from darkroom_server.service.input_fields import sources_of
from darkroom_server.service.inputs import InputLoader
from darkroom_server.service.request import GenerationRequest
from darkroom_server.service.stored_request import RequestCodec, StoredRequest
from darkroom_server.service.trace_context import TraceContext
from darkroom_server.service.validation import job_of

log = structlog.get_logger(__name__)

RETRY_SECONDS = 1.0

MAX_LOSSES = 3
"""Servers that died while they ran a job; after the last one it is not tried again."""


class Durability:
    """Stores accepted requests in the ledger, and takes up those of earlier servers.

    ``durable``: the ledger outlives the server. ``shared``: other servers use it too, so the quota
    of a caller is counted there.
    """

    def __init__(
        self,
        entries: LedgerEntries,
        codec: RequestCodec,
        dispatcher: Dispatcher,
        results: ResultStore,
        inputs: InputLoader,
        detached: DetachedJobs,
    ) -> None:
        self.durable = entries.durable
        self.shared = False
        self._entries = entries
        self._codec = codec
        self._dispatcher = dispatcher
        self._results = results
        self._inputs = inputs
        self._detached = detached

    def draft(
        self,
        request: GenerationRequest,
        call: CallContext,
        key: Key,
        active: ActiveJob,
        fingerprint: bytes,
        files: Mapping[str, bytes],
        *,
        detached: bool,
        plain: bool,
    ) -> Draft:
        """What the ledger stores of ``active``, which ``request`` asked for.

        ``files``: those of its pictures by digest. ``plain`` as of ``Draft``. Unless the ledger is
        shared, the caller's quota is counted by the dispatcher.
        """
        job, caller = active.job, call.caller
        stored = StoredRequest(
            request=request,
            seed=job.seed,
            model=job.model,
            model_revision=active.model.revision,
            address=caller.address,
            priority=caller.priority,
            trace_id=call.trace.trace_id if call.trace else "",
        )
        return Draft(
            key=key,
            fingerprint=fingerprint,
            record=self._codec.encode(stored),
            model=job.model,
            counted_as=counted_as(caller),
            goal=active.key().goal - job.submitted_at,
            age=time.monotonic() - job.submitted_at,
            deadline=None if job.deadline is None else job.deadline - job.submitted_at,
            detached=detached,
            plain=plain,
            max_live=caller.max_jobs if self.shared else None,
            max_queued=self._dispatcher.max_queued_jobs if self.shared else None,
            runtime=active.model.runtime.fingerprint if job.exact else None,
            needs=needs_of(job),
            inputs=files,
        )

    async def open(self) -> None:
        """Open the ledger, before any call is answered; raises ``StartupError``."""
        found = await self._entries.open()
        for entry in found:
            self._results.withhold(entry.key)
        if found:
            self._dispatcher.availability.restoring = True
            live = sum(not entry.standing.ended for entry in found)
            log.info("ledger", unfinished=live, ended=len(found) - live)

    async def take_up(self) -> None:
        """Run what earlier servers accepted, once the models are loaded; then accept new jobs.

        Raises what ``Dispatcher.loaded`` raises.
        """
        await self._dispatcher.loaded()
        availability = self._dispatcher.availability
        while availability.restoring:
            try:
                # Read again: loading may have taken minutes.
                for entry in sorted(await self._entries.mine(), key=_turn):
                    if self._results.is_withheld(entry.key):
                        await self.take_up_one(entry)
            except LedgerUnreachable:
                await asyncio.sleep(RETRY_SECONDS)
            else:
                self._results.sort_restored()
                availability.restoring = False
                availability.report()

    async def again(self, lost: ActiveJob, key: Key, call: CallContext) -> ActiveJob:
        """Generate the images of a finished job again, which are gone with an earlier server.

        Raises ``UnknownRequest`` if the ledger has forgotten it, ``LedgerUnreachable``,
        ``GenerationFailed`` for one that this server cannot run any more, and what
        ``Dispatcher.submit`` raises.
        """
        entry = await self._entries.find(key)
        if entry is None:
            raise UnknownRequest(key.request_id)
        self._check_fit(entry)
        _, _, job = await self._job(entry, images=True)
        current = self._results.find(*key)
        if not current.images_lost:  # Another call was faster.
            return current
        job = replace(job, submitted_at=time.monotonic(), deadline=None)
        return self._results.run_again(current, key, job, call.caller)

    async def active_of(self, entry: Entry) -> ActiveJob:
        """The job of an entry as its callers see it; it does not enter this server.

        Raises ``ValueError`` if the entry cannot be read, and ``GenerationFailed`` if this server
        does not have its model.
        """
        _, call, job = await self._job(entry, images=False)
        return ActiveJob(job, self._model(entry.model), call.caller)

    async def take_up_one(self, entry: Entry) -> None:
        """Run the job of an entry that is this server's; or note that it ended.

        Raises ``LedgerUnreachable``. If it cannot run, it fails, in the ledger too.
        """
        try:
            request, call, job = await self._job(entry, images=not entry.standing.ended)
            if entry.standing.ended:
                self._restore_ended(entry, job, call.caller)
            elif entry.losses >= MAX_LOSSES:
                error = _lost_too_often(entry.losses)
                await self._entries.fail(entry.hold, error)
                failed = replace(
                    entry, standing=Standing.FAILED, ended_for=0.0, failure=error.failure
                )
                self._restore_ended(failed, job, call.caller)
            else:
                self._check_fit(entry)
                self._run(entry, request, call, job)
        except LedgerUnreachable:
            raise
        except DarkroomError as error:
            log.warning("job of the ledger cannot run", job=entry.key.request_id, why=str(error))
            if not entry.standing.ended:
                await self._entries.fail(entry.hold, error)
            self._results.withhold(entry.key, Failure.of(error))
        except ValueError as error:
            # Of a newer version: that one may run it.
            why = f"this server cannot read its entry in the ledger: {error}"
            log.error("job of the ledger cannot be read", job=entry.key.request_id, why=why)
            self._results.withhold(entry.key, Failure(Reason.INTERNAL, why))

    def _run(self, entry: Entry, request: GenerationRequest, call: CallContext, job: Job) -> None:
        model = self._model(entry.model)
        active = self._dispatcher.resubmit(job, model, call.caller, entry.losses)
        self._results.restore(active, entry)
        of_job = {"request_id": entry.key.request_id}
        if call.caller.name != ANONYMOUS.name:
            of_job["caller"] = call.caller.name
        with structlog.contextvars.bound_contextvars(**of_job):  # No call has bound them.
            self._detached.record(request, call, job.submitted_at, active)

    def _restore_ended(self, entry: Entry, job: Job, caller: Caller) -> None:
        active = ActiveJob(job, self._model(entry.model), caller)
        if entry.standing is Standing.FINISHED:
            active.images_lost = True
            active.end(Finished((), StageSeconds()))
        else:
            active.end(error_of(entry))
        self._results.restore(active, entry)

    async def _job(
        self, entry: Entry, *, images: bool
    ) -> tuple[GenerationRequest, CallContext, Job]:
        """The job of an entry, as it was accepted; ``images``: with its pictures.

        Raises ``ValueError`` if the entry cannot be read, ``GenerationFailed`` if the model is not
        the same any more, and what validation and ``InputLoader.attach`` raise.
        """
        stored = self._codec.decode(entry.record)
        model = self._model(entry.model)
        # A model that was not loaded yet has no revision.
        if model.revision and stored.model_revision not in ("", model.revision):
            raise _model_gone(
                f"the generation was accepted with revision {stored.model_revision!r} of model "
                f"{entry.model!r}, and this server has {model.revision!r}"
            )
        call = CallContext(
            entry.key.request_id,
            Caller(name=entry.key.caller, address=stored.address, priority=stored.priority),
            TraceContext(stored.trace_id) if stored.trace_id else None,
        )
        now = time.monotonic()
        job = job_of(
            replace(stored.request, seed=stored.seed),
            model,
            call,
            job_id=entry.key.request_id,
            submitted_at=now - entry.age,
            deadline=None if entry.remaining is None else now + entry.remaining,
        )
        asked = stored.request.inputs
        if images and asked is not None and any(sources_of(asked)):
            files = await self._entries.inputs(entry.key)
            digests = {source.digest for _, source in sources_of(asked)}
            if missing := digests - files.keys():
                raise UploadNotFound(sorted(missing))
            job = await self._inputs.attach(job, stored.request, model, call.caller, files)
        return stored.request, call, job

    def _check_fit(self, entry: Entry) -> None:
        """Raise ``GenerationFailed`` if a job needs what its model does not offer any more.

        Also if an ``exact`` one began with another runtime than here.
        """
        model = self._model(entry.model)
        if missing := sorted(entry.needs - offers_of([model])):
            raise _model_gone(f"this server no longer offers {', '.join(missing)}")
        runtime = model.runtime.fingerprint
        if entry.runtime not in (None, "", runtime):
            raise _model_gone(
                "the generation is exact, and began with another device, dtype, layout or version "
                f"of a library than this server has for model {entry.model!r}"
            )

    def _model(self, model_id: str) -> ModelInfo:
        model = self._dispatcher.availability.models.get(model_id)
        if model is None:
            raise _model_gone(f"this server no longer serves model {model_id!r}")
        return model


def error_of(entry: Entry) -> DarkroomError:
    """Why the job of an entry ended without its images."""
    failure = entry.failure or Failure(Reason.INTERNAL, "the reason is not known")
    match entry.standing:
        case Standing.CANCELLED if failure.reason is Reason.DRAINING:
            return NotReady(failure.message, Reason.DRAINING, RETRY_SECONDS)
        case Standing.CANCELLED:
            message = failure.message if entry.failure else "the generation was cancelled"
            return JobCancelled(message)
        case Standing.EXPIRED:
            return DeadlineExceeded(failure.message)
    return GenerationFailed(failure)


def _turn(entry: Entry) -> tuple[bool, float]:
    """Ended entries in the order of their ends, then the others, the nearest goal first."""
    return entry.ended_for is None, entry.goal if entry.ended_for is None else -entry.ended_for


def _model_gone(why: str) -> GenerationFailed:
    return GenerationFailed(Failure(Reason.MODEL_GONE, f"{why}; send the request again"))


def _lost_too_often(losses: int) -> GenerationFailed:
    return GenerationFailed(
        Failure(
            Reason.ENGINE_CRASHED,
            f"{losses} servers died while they generated this, and it is not tried again; change "
            "the request",
        )
    )
