"""GenerationService over gRPC: calls that ask for images, and calls about them."""

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from darkroom.v1 import generation_pb2, generation_pb2_grpc
from darkroom_server.rpc.context import CURRENT_ANSWER, Context
from darkroom_server.rpc.event_stream import accepted_message, event_stream, finished_event
from darkroom_server.rpc.interceptors.call_context import reply_limit
from darkroom_server.rpc.jobs import generation_message
from darkroom_server.rpc.requests import generation_request, time_limit
from darkroom_server.rpc.responses import duration_message, response_of
from darkroom_server.service.call_context import CURRENT_CALL, CallContext
from darkroom_server.service.generation import GenerationService, request_id_of

Streamed = generation_pb2.GenerateStreamResponse
Watched = generation_pb2.WatchGenerationResponse


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """Converts each call for ``GenerationService``; every method raises ``DarkroomError``.

    ``server_id`` names this server to clients; set it before the first call.
    """

    def __init__(self, service: GenerationService) -> None:
        self.server_id = ""
        self._service = service

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> generation_pb2.GenerateResponse:
        """Generate images and return them in one message."""
        arrived, deadline, call = time.monotonic(), _deadline(context), CURRENT_CALL.get()
        asked = generation_request(request)
        with self._service.summaries.record(asked, call, arrived, deadline) as summary:
            limit = reply_limit(context.invocation_metadata() or ())
            request_id = request_id_of(asked, call)
            self._open_call(call, request_id, context)
            active, _ = await self._service.accept(
                asked,
                call,
                summary,
                deadline=deadline,
                idempotent=bool(asked.request_id),
                reply_limit=limit,
            )
            # A caller that disconnects cancels this task, and leaving the block unsubscribes it.
            with active.subscribe():
                finished = await active.result()
            summary.finished(finished)
            total = time.monotonic() - arrived
            return response_of(request_id, active.job, active.model, finished, total)

    async def GenerateStream(
        self, request: generation_pb2.GenerateStreamRequest, context: Context
    ) -> AsyncIterator[Any]:
        """Generate images and stream what happens meanwhile; bytes are a message as it is sent."""
        arrived, deadline, call = time.monotonic(), _deadline(context), CURRENT_CALL.get()
        asked = generation_request(request.generation, request.preview)
        with self._service.summaries.record(asked, call, arrived, deadline) as summary:
            request_id = request_id_of(asked, call)
            self._open_call(call, request_id, context)
            active, joined = await self._service.accept(
                asked, call, summary, deadline=deadline, idempotent=True
            )
            subscription = active.subscribe()
            del active  # A subscription releases the job of a stalled reader; so must this frame.
            previews = asked.preview_every > 0
            events = event_stream(
                request_id,
                subscription,
                server_id=self.server_id,
                joined=joined,
                previews=previews,
            )
            with subscription:
                async with aclosing(events):
                    async for event in events:
                        yield event if isinstance(event, bytes) else Streamed(event=event)
                finished = await subscription.active.result()
                last = finished_event(subscription.active, finished, arrived)
                # Before the last message: the client may end the call as soon as it has that.
                summary.finished(finished)
                CURRENT_ANSWER.get().complete = True
                del finished  # It holds the images, and the reader may be slow.
                yield Streamed(event=last)

    async def SubmitGeneration(
        self, request: generation_pb2.SubmitGenerationRequest, context: Context
    ) -> generation_pb2.SubmitGenerationResponse:
        """Accept a request that runs without a call that waits for it."""
        call = CURRENT_CALL.get()
        asked = generation_request(request.generation, request.preview)
        active, joined = await self._service.submit(
            asked, call, arrived=time.monotonic(), time_limit=time_limit(request)
        )
        message = accepted_message(
            request_id_of(asked, call), active, server_id=self.server_id, joined=joined
        )
        return generation_pb2.SubmitGenerationResponse(accepted=message)

    async def WatchGeneration(
        self, request: generation_pb2.WatchGenerationRequest, context: Context
    ) -> AsyncIterator[Any]:
        """Stream what happens to a job that an earlier call began; as ``GenerateStream``."""
        arrived, call, request_id = time.monotonic(), CURRENT_CALL.get(), request.request_id
        active = await self._service.find(call, request_id)
        self._open_call(call, request_id, context)
        with active.subscribe() as subscription:
            del active
            events = event_stream(
                request_id,
                subscription,
                server_id=self.server_id,
                joined=True,
                previews=True,
            )
            async with aclosing(events):
                async for event in events:
                    yield event if isinstance(event, bytes) else Watched(event=event)
            last = finished_event(subscription.active, await subscription.active.result(), arrived)
            CURRENT_ANSWER.get().complete = True
            yield Watched(event=last)

    async def CancelGeneration(
        self, request: generation_pb2.CancelGenerationRequest, context: Context
    ) -> generation_pb2.CancelGenerationResponse:
        """Cancel a job, even if other calls follow it."""
        cancelled = await self._service.cancel(CURRENT_CALL.get(), request.request_id)
        return generation_pb2.CancelGenerationResponse(cancelled=cancelled)

    async def GetGeneration(
        self, request: generation_pb2.GetGenerationRequest, context: Context
    ) -> generation_pb2.GetGenerationResponse:
        """Return the state of one job."""
        generation = await self._service.get(CURRENT_CALL.get(), request.request_id)
        return generation_pb2.GetGenerationResponse(generation=generation_message(generation))

    async def ListGenerations(
        self, request: generation_pb2.ListGenerationsRequest, context: Context
    ) -> generation_pb2.ListGenerationsResponse:
        """Return the state of one page of the caller's jobs."""
        page = await self._service.page(CURRENT_CALL.get(), request.page_size, request.page_token)
        return generation_pb2.ListGenerationsResponse(
            generations=[generation_message(generation) for generation in page.generations],
            next_page_token=page.next_token,
        )

    async def EstimateGeneration(
        self, request: generation_pb2.EstimateGenerationRequest, context: Context
    ) -> generation_pb2.EstimateGenerationResponse:
        """Estimate what a request would take now, without running it."""
        estimate = await self._service.estimate(
            generation_request(request.generation), CURRENT_CALL.get()
        )
        response = generation_pb2.EstimateGenerationResponse(
            peak_bytes=estimate.peak_bytes, available_bytes=estimate.available_bytes
        )
        if estimate.time is not None:
            response.queue_wait.CopyFrom(duration_message(estimate.time.queue_wait))
            response.run_time.CopyFrom(duration_message(estimate.time.run_time))
        return response

    def _open_call(self, call: CallContext, request_id: str, context: Context) -> None:
        """Count a call until its very end: a reply that nobody reads outlives the handler."""
        release = self._service.open_call(call, request_id)
        # The types allow only a callback of a class of their own.
        context.add_done_callback(lambda _: release())  # type: ignore[arg-type]


def _deadline(context: Context) -> float | None:
    """The caller's deadline in ``time.monotonic`` seconds, None without one."""
    remaining: float | None = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining
