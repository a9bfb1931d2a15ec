"""The fake server: a port, and its jobs."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from darkroom.v1 import generation_pb2_grpc, model_pb2_grpc, server_pb2_grpc
from darkroom_client._types.request import GenerationRequest
from darkroom_client._types.status import Estimate, ServerState
from darkroom_client.testing._behaviour import Behaviour
from darkroom_client.testing._job import FakeJob
from darkroom_client.testing._jobs import JobRegistry
from darkroom_client.testing._services import Services

SERVING = {
    "": (ServerState.READY,),
    "darkroom.v1.GenerationService": (ServerState.READY, ServerState.RECOVERING),
}
"""The states in which each health check answers SERVING."""

HANDLERS = 256


class _Health(health.HealthServicer):
    """Runs each watch on its own thread.

    Without that, ``HealthServicer`` sends while it holds its lock, and the end of a watch waits for
    that lock: setting a state while a watch ends would deadlock.
    """

    def __init__(self) -> None:
        super().__init__(experimental_non_blocking=False)

    def Watch(self, request: Any, context: Any, send_response_callback: Any = None) -> Any:
        """See ``HealthServicer.Watch``, which documents this."""
        return super().Watch(request, context)


class FakeServer:
    """Generates gradients at once, or follows its script; a context manager.

    ``token``: required of every caller. ``capacity``: concurrent jobs; further requests are
    rejected as ``Overloaded``. ``port``: a port of 127.0.0.1; 0 for any free one.

    All callers share its jobs. It keeps results until ``restart``. Images are PNG or raw RGB,
    previews are PNG.
    """

    def __init__(
        self, *, token: str | None = None, capacity: int | None = None, port: int = 0
    ) -> None:
        self.estimate = Estimate(queue_wait=0.0, run_time=1.0, peak_bytes=0, available_bytes=2**30)
        self._registry = JobRegistry(capacity)
        self._services = Services(self._registry, lambda: self.estimate, token)
        self._health = _Health()
        self._port = port
        self._server: grpc.Server | None = None
        self._handlers: ThreadPoolExecutor | None = None
        self.state = ServerState.READY

    @property
    def target(self) -> str:
        """The target for a ``Client``."""
        return f"127.0.0.1:{self._port}"

    @property
    def state(self) -> ServerState:
        """Whether requests are accepted, and the answer of health checks; may be set."""
        return self._registry.state

    @state.setter
    def state(self, state: ServerState) -> None:
        self._registry.state = state
        for service, states in SERVING.items():
            status = "SERVING" if state in states else "NOT_SERVING"
            number = health_pb2.HealthCheckResponse.ServingStatus.Value(status)
            self._health.set(service, number)

    @property
    def jobs(self) -> tuple[FakeJob, ...]:
        """Every job since the start, also before ``restart``, oldest first."""
        with self._registry.changed:
            return tuple(self._registry.jobs)

    @property
    def requests(self) -> tuple[GenerationRequest, ...]:
        """The requests of those jobs."""
        return tuple(job.request for job in self.jobs)

    def script(self, *behaviours: Behaviour, default: Behaviour | None = None) -> None:
        """Set the behaviours of the next requests, one each; ``default``: of all after them."""
        with self._registry.changed:
            self._registry.script.extend(behaviours)
            if default is not None:
                self._registry.default = default

    def wait_for(self, condition: Callable[[], bool], timeout: float = 30.0) -> None:
        """Wait until ``condition`` is true; it is checked when a job changes or is rejected.

        Raises ``TimeoutError`` after ``timeout`` seconds.
        """
        with self._registry.changed:
            if not self._registry.changed.wait_for(condition, timeout):
                raise TimeoutError(f"the condition was not true within {timeout:g} s")

    def drop_connections(self) -> None:
        """Break every connection, then accept new ones; jobs with ``KEEP`` continue."""
        self._stop()
        self._listen()

    def restart(self) -> None:
        """Break every connection and forget every job, then accept new connections."""
        self._stop()
        self._registry.forget()
        self._listen()

    def __enter__(self) -> Self:
        self._listen()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()
        self._registry.close()

    def _listen(self) -> None:
        self._handlers = ThreadPoolExecutor(HANDLERS)
        # No SO_REUSEPORT, or a second server could share the port.
        server = grpc.server(self._handlers, options=(("grpc.so_reuseport", 0),))
        services: Any = self._services
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(services, server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(services, server)
        server_pb2_grpc.add_ServerServiceServicer_to_server(services, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self._port = server.add_insecure_port(self.target)
        self._services.server_id = self.target
        server.start()
        self._server = server

    def _stop(self) -> None:
        if self._server is not None:
            self._server.stop(None).wait()
        if self._handlers is not None:
            self._handlers.shutdown()
