"""The jobs of the fake server: accepted, joined, forgotten."""

import threading
import uuid
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from functools import partial

from darkroom.v1 import generation_pb2
from darkroom_client._errors import (
    DarkroomError,
    InvalidRequest,
    Overloaded,
    Unavailable,
    UnknownRequest,
)
from darkroom_client._types.job import JobState
from darkroom_client._types.model import Model
from darkroom_client._types.status import ServerState
from darkroom_client.testing._adapters import Adapters
from darkroom_client.testing._behaviour import Behaviour
from darkroom_client.testing._catalogue import Catalogue, LoadError
from darkroom_client.testing._job import FakeJob
from darkroom_client.testing._models import RETRY_SECONDS, fill_defaults
from darkroom_client.testing._pictures import check_format
from darkroom_client.testing._uploads import Uploads
from darkroom_client.testing._validation import NO_PREVIEWS, check_reply, check_request


class JobRegistry:
    """Jobs by id; ``changed`` guards everything in it.

    ``closing``: the connections break, and every call has to end.
    """

    def __init__(
        self,
        capacity: int | None,
        models: Iterable[Model],
        load_errors: Mapping[str, LoadError],
        adapters: Adapters,
    ) -> None:
        self.changed = threading.Condition()
        self.state = ServerState.READY
        self.closing = False
        self.script: deque[Behaviour] = deque()
        self.default = Behaviour()
        self.catalogue = Catalogue(models, load_errors, jobs_of=self.running)
        self.adapters = adapters
        self.uploads = Uploads()
        self.jobs: list[FakeJob] = []
        self.rejections: Counter[str] = Counter()
        self._known: dict[str, FakeJob] = {}
        self._capacity = capacity

    def admit(
        self,
        request: generation_pb2.GenerateRequest,
        *,
        preview: generation_pb2.PreviewOptions = NO_PREVIEWS,
        time_limit: float | None = None,
        submitted: bool = False,
        max_reply_bytes: int | None = None,
    ) -> tuple[FakeJob, bool]:
        """Return the job of ``request``, and whether it existed before; raises its rejection.

        ``max_reply_bytes``: the limit of a reply in one message; None for a stream.
        """
        if not request.request_id:
            named = generation_pb2.GenerateRequest(request_id=uuid.uuid4().hex)
            named.MergeFrom(request)
            request = named
        with self.changed:
            kept = submitted or request.on_disconnect == generation_pb2.ON_DISCONNECT_KEEP
            known = self._known.get(request.request_id)
            if known is not None and not known.forgotten:
                if not known.same_as(request):
                    raise InvalidRequest(
                        f"request_id {request.request_id!r} names another request",
                        reason="REQUEST_CONFLICT",
                    )
                # As in the real server, a job that ended unfinished runs again.
                if known.state in (JobState.RUNNING, JobState.FINISHED):
                    known.add_caller(time_limit=time_limit, kept=kept)
                    return known, True
            try:
                model = self._accepting_model(request, preview)
                if max_reply_bytes is not None:
                    check_reply(request, model, max_reply_bytes)
                behaviour = self._behaviour()
            except DarkroomError as error:
                self.rejections[type(error).__name__] += 1
                self.changed.notify_all()
                raise
            load_error = None
            try:
                model = self.catalogue.use(model.id)
            except DarkroomError as error:
                # The load begins after the acceptance.
                load_error = error
            job = FakeJob(
                request,
                model,
                behaviour,
                self.changed,
                preview=preview,
                time_limit=time_limit,
                kept=kept,
                loaded=partial(self.catalogue.loaded, model.id),
                load_error=load_error,
            )
            self._known.pop(request.request_id, None)
            self._known[request.request_id] = job
            self.jobs.append(job)
            job.start()
            self.changed.notify_all()
            return job, False

    def find(self, request_id: str) -> FakeJob:
        """The job of that id; raises ``UnknownRequest``."""
        with self.changed:
            job = self._known.get(request_id)
            if job is None or job.forgotten:
                raise UnknownRequest(f"no generation {request_id!r} is known")
            return job

    def known(self) -> list[FakeJob]:
        """The jobs that callers can ask about, in the order of acceptance."""
        return [job for job in self._known.values() if not job.forgotten]

    def running(self, model: str | None = None) -> int:
        """The number of jobs that run, of ``model`` or of all models."""
        return sum(
            job.state is JobState.RUNNING and model in (None, job.message.model)
            for job in self.jobs
        )

    def jobs_with(self, adapter: str) -> int:
        """The number of jobs that run and use ``adapter``."""
        return sum(
            job.state is JobState.RUNNING and any(x.id == adapter for x in job.message.loras)
            for job in self.jobs
        )

    def forget(self) -> None:
        """Cancel and forget every job, like a new server."""
        with self.changed:
            for job in self._known.values():
                job.forgotten = True
                job.cancel()
            self._known.clear()

    def close(self) -> None:
        """Cancel every job and wait for its thread."""
        self.forget()
        for job in self.jobs:
            job.join()

    def check(
        self,
        request: generation_pb2.GenerateRequest,
        preview: generation_pb2.PreviewOptions = NO_PREVIEWS,
    ) -> Model:
        """The model of ``request``; raises if the model does not accept it."""
        model = self.catalogue.find(request.model)
        check_request(request, model, preview)
        self.adapters.check(request, model)
        check_format(fill_defaults(request, model).format)
        self.uploads.check(request)
        return model

    def _accepting_model(
        self, request: generation_pb2.GenerateRequest, preview: generation_pb2.PreviewOptions
    ) -> Model:
        if self.state is ServerState.LOADING:
            raise Unavailable(
                "the model is loading", reason="MODEL_LOADING", retry_after=RETRY_SECONDS
            )
        if self.state is ServerState.DRAINING:
            raise Unavailable("the server is shutting down", retry_after=RETRY_SECONDS)
        return self.check(request, preview)

    def _behaviour(self) -> Behaviour:
        if self._capacity is not None and self.running() >= self._capacity:
            raise Overloaded("the queue is full", retry_after=RETRY_SECONDS)
        behaviour = self.script.popleft() if self.script else self.default
        if behaviour.error is not None and behaviour.error_at_step == 0:
            raise behaviour.error
        return behaviour
