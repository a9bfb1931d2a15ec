"""The fake server itself: a port, and the jobs behind it."""

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
"""The names of health checks: whether requests can be drawn, and whether they are taken."""

HANDLERS = 256


class _Health(health.HealthServicer):
    """Watches on threads of their own.

    Without, the servicer sends under its lock, for which the end of a watch waits: a state that is
    set while a watcher leaves would then be set for ever.
    """

    def __init__(self) -> None:
        super().__init__(experimental_non_blocking=False)

    def Watch(self, request: Any, context: Any, send_response_callback: Any = None) -> Any:
        """See ``HealthServicer``, which notes the above at this very method."""
        return super().Watch(request, context)


class FakeServer:
    """Draws gradients at once, or does what its script says; a context manager.

    ``token``: wanted of every caller. ``capacity``: jobs at a time, beyond which requests are
    refused as ``Overloaded``. ``port``: 0 for any free one of 127.0.0.1.

    Its jobs belong to one caller. A kept result is kept until ``restart``. Pictures are PNG or
    raw RGB, previews are PNG.
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
        """What a ``Client`` takes as its target."""
        return f"127.0.0.1:{self._port}"

    @property
    def state(self) -> ServerState:
        """Whether requests are taken, and what health checks say; may be set."""
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
        """Every job that was accepted since the start, restarts included, oldest first."""
        with self._registry.changed:
            return tuple(self._registry.jobs)

    @property
    def requests(self) -> tuple[GenerationRequest, ...]:
        """What those jobs asked for."""
        return tuple(job.request for job in self.jobs)

    def script(self, *behaviours: Behaviour, default: Behaviour | None = None) -> None:
        """Treat the next requests like this, one each; ``default``: all those after them."""
        with self._registry.changed:
            self._registry.script.extend(behaviours)
            if default is not None:
                self._registry.default = default

    def wait_for(self, condition: Callable[[], bool], timeout: float = 30.0) -> None:
        """Return once ``condition`` holds; it is asked whenever a job changes or is refused.

        Raises ``TimeoutError`` after ``timeout`` seconds.
        """
        with self._registry.changed:
            if not self._registry.changed.wait_for(condition, timeout):
                raise TimeoutError(f"it did not come true within {timeout:g} s")

    def drop_connections(self) -> None:
        """Break every connection and take new ones; jobs that are kept go on."""
        self._hang_up()
        self._listen()

    def restart(self) -> None:
        """Break every connection, forget every job, and take new ones at the same address."""
        self._hang_up()
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
        self._hang_up()
        self._registry.close()

    def _listen(self) -> None:
        self._handlers = ThreadPoolExecutor(HANDLERS)
        # Without SO_REUSEPORT, or a second server could share the port unnoticed.
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

    def _hang_up(self) -> None:
        if self._server is not None:
            self._server.stop(None).wait()
        if self._handlers is not None:
            self._handlers.shutdown()
