"""The gRPC services of the fake server."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from google.protobuf.duration_pb2 import Duration

from darkroom.v1 import (
    generation_pb2,
    generation_pb2_grpc,
    image_pb2,
    image_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)
from darkroom_client._errors import DarkroomError, PermissionDenied, Unauthenticated, Violation
from darkroom_client._protocol.balancing import BACKLOG_KEY
from darkroom_client._types.job import JobState
from darkroom_client._types.model import Model
from darkroom_client._types.status import Estimate
from darkroom_client._wire.adapters import encode_adapter
from darkroom_client.testing._job import FakeJob
from darkroom_client.testing._jobs import JobRegistry
from darkroom_client.testing._models import encode_model
from darkroom_client.testing._statuses import abort, drop
from darkroom_client.testing._uploads import NOT_A_PICTURE, SIGNATURES
from darkroom_client.testing._validation import (
    NO_PREVIEWS,
    check_request_id,
    check_time_limit,
    invalid,
)

DEFAULT_MAX_REPLY_BYTES = 4 * 2**20
"""gRPC's default limit of a message, for a caller that sends none."""

ENDED = (JobState.FINISHED, JobState.FAILED, JobState.EXPIRED, JobState.CANCELLED)
DEFAULT_PAGE_SIZE = 100

UPLOAD_SECONDS = 3600.0

_NOT_REPEATED = ("progress", "preview")


class Services(
    generation_pb2_grpc.GenerationServiceServicer,
    image_pb2_grpc.ImageServiceServicer,
    model_pb2_grpc.ModelServiceServicer,
    server_pb2_grpc.ServerServiceServicer,
):
    """Every call of ``darkroom.v1``, over the jobs of a registry; ``server_id`` is its address."""

    server_id = ""

    def __init__(
        self,
        registry: JobRegistry,
        estimate: Callable[[], Estimate],
        token: str | None,
        *,
        admin: bool,
    ) -> None:
        self._registry = registry
        self._estimate = estimate
        self._token = token
        self._admin = admin
        self.backlog: float | None = 0.0

    def Generate(self, request: generation_pb2.GenerateRequest, context: Any) -> Any:
        job, joined = self._admitted(request, context, max_reply_bytes=_max_reply_bytes(context))
        for _ in self._follow(job, context, late=joined):
            pass
        return job.response()

    def GenerateStream(
        self, request: generation_pb2.GenerateStreamRequest, context: Any
    ) -> Iterator[generation_pb2.GenerateStreamResponse]:
        job, joined = self._admitted(request.generation, context, preview=request.preview)
        events = self._follow(job, context, late=joined)
        accepted = generation_pb2.GenerationEvent(
            accepted=job.accepted(self.server_id, joined=joined)
        )
        yield generation_pb2.GenerateStreamResponse(event=accepted)
        for event in events:
            yield generation_pb2.GenerateStreamResponse(event=event)

    def SubmitGeneration(
        self, request: generation_pb2.SubmitGenerationRequest, context: Any
    ) -> Any:
        self._authenticate(context)
        self._report_load(context)
        limit = request.time_limit.ToNanoseconds() / 1e9 if request.HasField("time_limit") else None
        try:
            check_time_limit(limit)
            job, joined = self._registry.admit(
                request.generation,
                preview=request.preview,
                time_limit=limit,
                submitted=True,
            )
        except DarkroomError as error:
            abort(context, error)
        return generation_pb2.SubmitGenerationResponse(
            accepted=job.accepted(self.server_id, joined=joined)
        )

    def WatchGeneration(
        self, request: generation_pb2.WatchGenerationRequest, context: Any
    ) -> Iterator[generation_pb2.WatchGenerationResponse]:
        job = self._found(request.request_id, context)
        events = self._follow(job, context, late=True)
        accepted = generation_pb2.GenerationEvent(
            accepted=job.accepted(self.server_id, joined=True)
        )
        yield generation_pb2.WatchGenerationResponse(event=accepted)
        for event in events:
            yield generation_pb2.WatchGenerationResponse(event=event)

    def CancelGeneration(
        self, request: generation_pb2.CancelGenerationRequest, context: Any
    ) -> Any:
        job = self._found(request.request_id, context)
        with self._registry.changed:
            return generation_pb2.CancelGenerationResponse(cancelled=job.cancel())

    def GetGeneration(self, request: generation_pb2.GetGenerationRequest, context: Any) -> Any:
        job = self._found(request.request_id, context)
        with self._registry.changed:
            return generation_pb2.GetGenerationResponse(generation=job.generation())

    def ListGenerations(self, request: generation_pb2.ListGenerationsRequest, context: Any) -> Any:
        self._authenticate(context)
        with self._registry.changed:
            jobs = self._registry.known()
            # The token is the number of jobs that the pages to come have.
            left = int(request.page_token or len(jobs))
            page = jobs[:left][-(request.page_size or DEFAULT_PAGE_SIZE) :]
            left -= len(page)
            return generation_pb2.ListGenerationsResponse(
                generations=[job.generation() for job in reversed(page)],
                next_page_token=str(left) if left else "",
            )

    def EstimateGeneration(
        self, request: generation_pb2.EstimateGenerationRequest, context: Any
    ) -> Any:
        self._authenticate(context)
        try:
            self._registry.check(request.generation)
        except DarkroomError as error:
            abort(context, error)
        estimate = self._estimate()
        return generation_pb2.EstimateGenerationResponse(
            queue_wait=_duration(estimate.queue_wait),
            run_time=_duration(estimate.run_time),
            peak_bytes=estimate.peak_bytes,
            available_bytes=estimate.available_bytes,
        )

    def UploadImage(
        self, request_iterator: Iterator[image_pb2.UploadImageRequest], context: Any
    ) -> Any:
        self._authenticate(context)
        data = b"".join(request.chunk for request in request_iterator)
        if not SIGNATURES.match(data):
            abort(context, invalid(Violation(field="chunk", description=NOT_A_PICTURE)))
        with self._registry.changed:
            upload_id = self._registry.uploads.add(data)
        return image_pb2.UploadImageResponse(
            upload_id=upload_id, expires_in=_duration(UPLOAD_SECONDS)
        )

    def ListModels(self, request: model_pb2.ListModelsRequest, context: Any) -> Any:
        self._authenticate(context)
        with self._registry.changed:
            models = self._registry.catalogue.models
        return model_pb2.ListModelsResponse(models=map(encode_model, models))

    def ListAdapters(self, request: model_pb2.ListAdaptersRequest, context: Any) -> Any:
        self._authenticate(context)
        with self._registry.changed:
            adapters = self._registry.adapters.offered
        if request.model:
            id = self._model(request.model, context).id
            adapters = [adapter for adapter in adapters if id in adapter.models]
        return model_pb2.ListAdaptersResponse(adapters=map(encode_adapter, adapters))

    def AddAdapter(self, request: model_pb2.AddAdapterRequest, context: Any) -> Any:
        self._authenticate(context, as_admin=True)
        registry = self._registry
        with self._changing(context):
            added = registry.adapters.add(request.id, registry.jobs_with(request.id))
        return model_pb2.AddAdapterResponse(adapter=encode_adapter(added))

    def RemoveAdapter(self, request: model_pb2.RemoveAdapterRequest, context: Any) -> Any:
        self._authenticate(context, as_admin=True)
        registry = self._registry
        with self._changing(context):
            registry.adapters.remove(request.id)
            jobs = registry.jobs_with(request.id)
        return model_pb2.RemoveAdapterResponse(unfinished_jobs=jobs)

    def GetModel(self, request: model_pb2.GetModelRequest, context: Any) -> Any:
        self._authenticate(context)
        model = self._model(request.model, context)
        return model_pb2.GetModelResponse(model=encode_model(model))

    def LoadModel(self, request: model_pb2.LoadModelRequest, context: Any) -> Any:
        self._authenticate(context, as_admin=True)
        with self._changing(context):
            model = self._registry.catalogue.load(request.model)
        return model_pb2.LoadModelResponse(model=encode_model(model))

    def UnloadModel(self, request: model_pb2.UnloadModelRequest, context: Any) -> Any:
        self._authenticate(context, as_admin=True)
        with self._changing(context):
            jobs = self._registry.catalogue.unload(request.model)
        return model_pb2.UnloadModelResponse(unfinished_jobs=jobs)

    def PinModel(self, request: model_pb2.PinModelRequest, context: Any) -> Any:
        self._authenticate(context, as_admin=True)
        with self._changing(context):
            model = self._registry.catalogue.pin(request.model, pinned=request.pinned)
        return model_pb2.PinModelResponse(model=encode_model(model))

    def GetStatus(self, request: server_pb2.GetStatusRequest, context: Any) -> Any:
        self._authenticate(context)
        registry = self._registry
        with registry.changed:
            running = registry.running()
            ended = {
                state.value: sum(job.state is state for job in registry.jobs) for state in ENDED
            }
            state = f"SERVER_STATE_{registry.state.name}"
            return server_pb2.GetStatusResponse(
                version="fake",
                state=server_pb2.ServerState.Value(state),
                models=[
                    _model_status(model, registry.running(model.id))
                    for model in registry.catalogue.models
                ],
                engines=[
                    server_pb2.EngineStatus(
                        device="fake",
                        ready=True,
                        jobs=running,
                        weight_bytes=registry.catalogue.bytes_by_tier,
                    )
                ],
                running_jobs=running,
                max_queued_jobs=64,
                accepted_jobs=len(registry.jobs),
                ended_jobs=ended,
            )

    def _model(self, name: str, context: Any) -> Model:
        with self._changing(context):
            return self._registry.catalogue.find(name)

    @contextmanager
    def _changing(self, context: Any) -> Iterator[None]:
        """Hold the registry's condition; an error ends the call."""
        try:
            with self._registry.changed:
                yield
        except DarkroomError as error:
            abort(context, error)

    def _admitted(
        self,
        request: generation_pb2.GenerateRequest,
        context: Any,
        preview: generation_pb2.PreviewOptions = NO_PREVIEWS,
        max_reply_bytes: int | None = None,
    ) -> tuple[FakeJob, bool]:
        self._authenticate(context)
        self._report_load(context)
        left = context.time_remaining()
        try:
            return self._registry.admit(
                request,
                preview=preview,
                max_reply_bytes=max_reply_bytes,
                # gRPC represents "no limit" by some hundred years.
                time_limit=left if left is not None and left < 1e8 else None,
            )
        except DarkroomError as error:
            abort(context, error)

    def _report_load(self, context: Any) -> None:
        if self.backlog is not None:
            context.set_trailing_metadata(((BACKLOG_KEY, f"{self.backlog:.3f}"),))

    def _found(self, request_id: str, context: Any) -> FakeJob:
        self._authenticate(context)
        try:
            check_request_id(request_id)
            return self._registry.find(request_id)
        except DarkroomError as error:
            abort(context, error)

    def _follow(
        self, job: FakeJob, context: Any, *, late: bool
    ) -> Iterator[generation_pb2.GenerationEvent]:
        """Count the caller from now on, and return the job's events until its end.

        ``late``: the job ran before this call, whose past progress is left out. To be called before
        the first message is sent: gRPC drops the handler of a call that is cancelled meanwhile.
        """
        with self._registry.changed:
            past, drops = (len(job.events), job.drops) if late else (0, 0)
            job.waiters += 1
        if not context.add_callback(lambda: self._remove_waiter(job)):
            self._remove_waiter(job)
        return self._events(job, context, past, drops)

    def _events(
        self, job: FakeJob, context: Any, past: int, drops: int
    ) -> Iterator[generation_pb2.GenerationEvent]:
        """The job's events; ``past``: how many were before; ``drops``: the drops before."""
        changed, sent = self._registry.changed, 0
        while True:
            with changed:
                changed.wait_for(partial(self._has_news, job, context, sent, drops))
                if not context.is_active():
                    return
                if job.drops > drops or job.forgotten or self._registry.closing:
                    drop(context)
                fresh, sent = job.events[sent:], len(job.events)
                ended, error = job.state is not JobState.RUNNING, job.error
            for index, event in enumerate(fresh, sent - len(fresh)):
                if index >= past or event.WhichOneof("event") not in _NOT_REPEATED:
                    yield event
            if ended:
                if error is not None:
                    abort(context, error)
                return

    def _has_news(self, job: FakeJob, context: Any, sent: int, drops: int) -> bool:
        ended = job.state is not JobState.RUNNING or not context.is_active()
        dropped = job.drops > drops or self._registry.closing
        return ended or dropped or sent < len(job.events)

    def _remove_waiter(self, job: FakeJob) -> None:
        with self._registry.changed:
            job.waiters -= 1
            if job.waiters == 0 and not job.kept:
                job.cancel()
            self._registry.changed.notify_all()

    def _authenticate(self, context: Any, *, as_admin: bool = False) -> None:
        given = dict(context.invocation_metadata()).get("authorization")
        if self._token is not None and given != f"Bearer {self._token}":
            abort(context, Unauthenticated("the token is missing or wrong"))
        if as_admin and not self._admin:
            abort(context, PermissionDenied("this is for callers whose token says admin = true"))


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def _model_status(model: Model, running: int) -> server_pb2.ModelStatus:
    message = encode_model(model)
    return server_pb2.ModelStatus(
        id=model.id,
        ready=model.ready,
        running_jobs=running,
        runtime=message.runtime if message.HasField("runtime") else None,
        max_rows=message.limits.max_rows,
        row_limit_source=message.limits.row_limit_source,
        state=message.state,
        state_reason=message.state_reason,
        weight_bytes=message.weight_bytes,
        last_used=message.last_used if message.HasField("last_used") else None,
        pinned=message.pinned,
        load=message.load if message.HasField("load") else None,
    )


def _max_reply_bytes(context: Any) -> int:
    sent = dict(context.invocation_metadata()).get("darkroom-max-reply-bytes")
    return DEFAULT_MAX_REPLY_BYTES if sent is None else int(sent)
