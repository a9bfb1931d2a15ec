"""GenerationService: one call, one job."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import structlog

from darkroom.v1 import generation_pb2, generation_pb2_grpc
from darkroom_server.core.errors import DarkroomError
from darkroom_server.dispatch import Dispatcher
from darkroom_server.rpc.context import Context, has_expired, remaining_seconds
from darkroom_server.rpc.models import chosen_model
from darkroom_server.rpc.reply_size import max_reply_bytes
from darkroom_server.rpc.responses import response_of
from darkroom_server.rpc.summary import Outcome, RequestObserver, RequestSummary, outcome_of
from darkroom_server.rpc.validation import job_of, request_id_of

log = structlog.get_logger(__name__)


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Draws images; every call leaves one line in the log and one record with ``observer``.

    Two calls of the same ``request_id`` at once are two jobs.
    """

    def __init__(
        self, dispatcher: Dispatcher, observer: RequestObserver, *, log_prompts: bool = False
    ) -> None:
        self._dispatcher = dispatcher
        self._observer = observer
        self._log_prompts = log_prompts

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> generation_pb2.GenerateResponse:
        """Draw the images of one request; raises ``DarkroomError``."""
        arrived = time.monotonic()
        request_id = request_id_of(request)
        structlog.contextvars.bind_contextvars(request_id=request_id)
        with self._summarised(request, context, arrived) as summary:
            models = self._dispatcher.models
            model_id = chosen_model(request.model, list(models))
            summary.model = model_id
            model = self._dispatcher.model(model_id)
            remaining = remaining_seconds(context)
            job = job_of(
                request,
                model,
                job_id=self._dispatcher.unused_id(request_id),
                submitted_at=arrived,
                deadline=None if remaining is None else time.monotonic() + remaining,
                max_reply_bytes=max_reply_bytes(context.invocation_metadata() or ()),
            )
            summary.images = job.image_count
            # Leaving the block gives the job up: a caller that goes away arrives here as a
            # cancelled task.
            with self._dispatcher.submit(job) as accepted:
                finished = await accepted.result()
            summary.outcome = Outcome.FINISHED
            summary.stages = finished.stages
            summary.flagged = sum(image.flagged for image in finished.images)
            return response_of(request_id, job, model, finished, time.monotonic() - arrived)

    @contextmanager
    def _summarised(
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
        except asyncio.CancelledError:
            summary.outcome = Outcome.EXPIRED if has_expired(context) else Outcome.CANCELLED
            raise
        finally:
            summary.seconds = time.monotonic() - arrived
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
        if summary.flagged:
            fields["flagged"] = summary.flagged
        if summary.stages is not None:
            fields["stages"] = {k: round(v, 4) for k, v in asdict(summary.stages).items()}
        if self._log_prompts:
            fields["prompt"] = request.prompt
            fields["negative_prompt"] = request.negative_prompt
        log.info("request", **fields)
