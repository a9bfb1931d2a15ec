"""The jobs of the fake server: who is accepted, who joins, who is forgotten."""

import threading
import uuid
from collections import Counter, deque

from darkroom.v1 import generation_pb2
from darkroom_client._errors import (
    DarkroomError,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    Unavailable,
    UnknownRequest,
)
from darkroom_client._types.status import ServerState
from darkroom_client.testing._behaviour import Behaviour
from darkroom_client.testing._job import FakeJob, JobState
from darkroom_client.testing._pictures import check_format

RETRY_SECONDS = 0.05


class JobRegistry:
    """Jobs by their ids; everything in it is guarded by ``changed``."""

    def __init__(self, capacity: int | None) -> None:
        self.changed = threading.Condition()
        self.state = ServerState.READY
        self.script: deque[Behaviour] = deque()
        self.default = Behaviour()
        self.models = ["demo"]
        self.jobs: list[FakeJob] = []
        self.refusals: Counter[str] = Counter()
        self._known: dict[str, FakeJob] = {}
        self._capacity = capacity

    def admit(
        self,
        request: generation_pb2.GenerateRequest,
        *,
        preview_every: int = 0,
        time_limit: float | None = None,
        submitted: bool = False,
    ) -> tuple[FakeJob, bool]:
        """The job of ``request`` and whether it was there before; raises what it is refused for."""
        if not request.request_id:
            named = generation_pb2.GenerateRequest(request_id=uuid.uuid4().hex)
            named.MergeFrom(request)
            request = named
        with self.changed:
            kept = submitted or request.on_disconnect == generation_pb2.ON_DISCONNECT_KEEP
            known = self._known.get(request.request_id)
            if known is not None and not known.forgotten:
                if not known.asks_for(request):
                    raise InvalidRequest(
                        f"request_id {request.request_id!r} names another request",
                        reason="REQUEST_CONFLICT",
                    )
                # As the real server does: what ended unfinished is run anew.
                if known.state in (JobState.RUNNING, JobState.FINISHED):
                    known.join_in(time_limit=time_limit, kept=kept)
                    return known, True
            try:
                behaviour = self._behaviour(request)
            except DarkroomError as error:
                self.refusals[type(error).__name__] += 1
                self.changed.notify_all()
                raise
            job = FakeJob(
                request,
                behaviour,
                self.changed,
                preview_every=preview_every,
                time_limit=time_limit,
                kept=kept,
            )
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

    def running(self) -> int:
        """How many jobs have not ended."""
        return sum(job.state is JobState.RUNNING for job in self.jobs)

    def forget(self) -> None:
        """End every job, and know of none any more, as a server that was replaced."""
        with self.changed:
            for job in self._known.values():
                job.forgotten = True
                job.cancel()
            self._known.clear()

    def close(self) -> None:
        """End every job and its thread."""
        self.forget()
        for job in self.jobs:
            job.join()

    def _behaviour(self, request: generation_pb2.GenerateRequest) -> Behaviour:
        if self.state is ServerState.LOADING:
            raise Unavailable(
                "the model is loading", reason="MODEL_LOADING", retry_after=RETRY_SECONDS
            )
        if self.state is ServerState.DRAINING:
            raise Unavailable("the server is going away", retry_after=RETRY_SECONDS)
        if request.model and request.model not in self.models:
            raise ModelNotFound(f"no model {request.model!r}; this server holds {self.models}")
        check_format(request)
        if self._capacity is not None and self.running() >= self._capacity:
            raise Overloaded("the queue is full", retry_after=RETRY_SECONDS)
        behaviour = self.script.popleft() if self.script else self.default
        if behaviour.error is not None and behaviour.error_at_step == 0:
            raise behaviour.error
        return behaviour
