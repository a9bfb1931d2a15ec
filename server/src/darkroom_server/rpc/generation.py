"""GenerationService: calls that ask for images, and those that ask what became of them."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress

from darkroom.v1 import generation_pb2, generation_pb2_grpc
from darkroom_server.core.errors import DarkroomError
from darkroom_server.core.job import Job
from darkroom_server.dispatch import ActiveJob, ConcurrentCallLimiter, Dispatcher, ResultStore
from darkroom_server.rpc.caller import current_caller
from darkroom_server.rpc.context import Context, remaining_seconds
from darkroom_server.rpc.estimate import estimate_of
from darkroom_server.rpc.event_stream import accepted_message, story
from darkroom_server.rpc.incoming_request import (
    IncomingRequest,
    checked_id,
    deadline_after,
    time_limit,
)
from darkroom_server.rpc.models import resolve_model
from darkroom_server.rpc.reply_size import max_reply_bytes, reply_size_error
from darkroom_server.rpc.responses import response_of
from darkroom_server.rpc.summary import RequestObserver, RequestSummary, Summaries
from darkroom_server.rpc.validation import job_of


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Draws images; every call that asks for some leaves one summary.

    ``server_id`` names this server to clients. Set it before the first call.
    """

    server_id = ""

    def __init__(
        self,
        dispatcher: Dispatcher,
        requests: ResultStore,
        observer: RequestObserver,
        *,
        log_prompts: bool = False,
    ) -> None:
        self._dispatcher = dispatcher
        self._requests = requests
        self._seats = ConcurrentCallLimiter(dispatcher.max_jobs)
        self._summaries = Summaries(observer, log_prompts=log_prompts)
        self._followed: set[asyncio.Task[None]] = set()

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> generation_pb2.GenerateResponse:
        """Draw the images of one request; raises ``DarkroomError``."""
        asked = IncomingRequest(request, None, known=bool(request.request_id))
        with self._summaries.of(request, context, asked.arrived) as summary:
            limit = max_reply_bytes(context.invocation_metadata() or ())
            self._count_call(asked.id, context)
            deadline = deadline_after(remaining_seconds(context))
            accepted, _ = self._accept(asked, summary, deadline, limit=limit)
            # Leaving the block is leaving the job: a caller that goes away arrives here as a
            # cancelled task.
            with accepted.waiter():
                if error := reply_size_error(accepted.job, limit):
                    raise error  # Who began the job took it in pieces, or could take more.
                finished = await accepted.result()
            summary.finished(finished)
            total = time.monotonic() - asked.arrived
            return response_of(asked.id, accepted.job, accepted.model, finished, total)

    async def GenerateStream(
        self, request: generation_pb2.GenerateStreamRequest, context: Context
    ) -> AsyncIterator[generation_pb2.GenerateStreamResponse]:
        """Draw the images of one request, and tell the whole story; raises ``DarkroomError``."""
        asked = IncomingRequest(request.generation, request.preview, known=True)
        with self._summaries.of(asked.request, context, asked.arrived) as summary:
            self._count_call(asked.id, context)
            deadline = deadline_after(remaining_seconds(context))
            accepted, joined = self._accept(asked, summary, deadline)
            waiter = accepted.waiter()
            del accepted  # A waiter lets go of a job whose reader has stalled; so must we.
            previews = request.preview.every_steps > 0
            told = story(
                asked.id,
                waiter,
                asked.arrived,
                server_id=self.server_id,
                joined=joined,
                previews=previews,
            )
            with waiter:
                async with aclosing(told):
                    async for event in told:
                        yield generation_pb2.GenerateStreamResponse(event=event)
                summary.finished(await waiter.accepted.result())

    async def SubmitGeneration(
        self, request: generation_pb2.SubmitGenerationRequest, context: Context
    ) -> generation_pb2.SubmitGenerationResponse:
        """Leave a request to be drawn while nobody waits; raises ``DarkroomError``."""
        asked = IncomingRequest(request.generation, request.preview, known=True)
        with self._summaries.of(asked.request, context, asked.arrived) as summary:
            deadline = deadline_after(time_limit(request))
            accepted, joined = self._accept(asked, summary, deadline)
            self._requests.detach(accepted)
            summary.goes_on = True
        if not joined:
            task = asyncio.create_task(self._log_when_done(asked, accepted, context))
            self._followed.add(task)
            task.add_done_callback(self._followed.discard)
        message = accepted_message(asked.id, accepted, server_id=self.server_id, joined=joined)
        return generation_pb2.SubmitGenerationResponse(accepted=message)

    async def WatchGeneration(
        self, request: generation_pb2.WatchGenerationRequest, context: Context
    ) -> AsyncIterator[generation_pb2.WatchGenerationResponse]:
        """Tell what happens to a job; raises ``UnknownRequest``, and what the job ended with."""
        arrived = time.monotonic()
        id = checked_id(request.request_id)
        self._count_call(id, context)
        with self._requests.find(current_caller().name, id).waiter() as waiter:
            told = story(id, waiter, arrived, server_id=self.server_id, joined=True, previews=True)
            async with aclosing(told):
                async for event in told:
                    yield generation_pb2.WatchGenerationResponse(event=event)

    async def CancelGeneration(
        self, request: generation_pb2.CancelGenerationRequest, context: Context
    ) -> generation_pb2.CancelGenerationResponse:
        """End a job, whoever waits for it; raises ``UnknownRequest``."""
        id = checked_id(request.request_id)
        cancelled = self._requests.cancel(current_caller().name, id)
        return generation_pb2.CancelGenerationResponse(cancelled=cancelled)

    async def EstimateGeneration(
        self, request: generation_pb2.EstimateGenerationRequest, context: Context
    ) -> generation_pb2.EstimateGenerationResponse:
        """Tell what a request would take, without drawing it; raises ``DarkroomError``."""
        return estimate_of(request.generation, current_caller(), self._dispatcher)

    def _count_call(self, id: str, context: Context) -> None:
        """Count a call that waits for the job ``id``, to its very end; raises ``QuotaExceeded``."""
        # Not a block around the handler: a reply that nobody reads is there when that is over.
        leave = self._seats.take(current_caller().name, id)
        # The types know no callback but one of a class of their own.
        context.add_done_callback(lambda _: leave())  # type: ignore[arg-type]

    def _accept(
        self,
        asked: IncomingRequest,
        summary: RequestSummary,
        deadline: float | None,
        *,
        limit: int | None = None,
    ) -> tuple[ActiveJob, bool]:
        """The job that is asked for, and whether it was there before."""
        caller = current_caller()

        def make_job() -> Job:
            model_id = resolve_model(asked.request.model, list(self._dispatcher.models))
            summary.model = model_id
            job = job_of(
                asked.request,
                self._dispatcher.model(model_id),
                job_id=self._dispatcher.new_job_id(asked.id),
                submitted_at=asked.arrived,
                deadline=deadline,
                caller=caller,
                preview=asked.preview,
                max_reply_bytes=limit,
            )
            summary.images, summary.steps = job.image_count, job.steps
            return job

        if not asked.known:
            accepted = self._dispatcher.submit(make_job(), caller)
            summary.asks_for(accepted)
            return accepted, False
        accepted, joined = self._requests.begin(
            caller, asked.id, asked.fingerprint(), deadline, make_job
        )
        summary.asks_for(accepted)
        if asked.keep:
            self._requests.keep(accepted)
        return accepted, joined

    async def _log_when_done(
        self, asked: IncomingRequest, accepted: ActiveJob, context: Context
    ) -> None:
        """Leave the summary of a job whose caller does not wait."""
        with (
            suppress(DarkroomError),
            self._summaries.of(asked.request, context, asked.arrived) as summary,
        ):
            job = accepted.job
            summary.images, summary.steps = job.image_count, job.steps
            summary.asks_for(accepted)
            summary.finished(await accepted.result())
