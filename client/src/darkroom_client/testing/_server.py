"""The fake server: a port, and its jobs."""

import socket
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType, TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2_grpc

from darkroom.v1 import generation_pb2_grpc, image_pb2_grpc, model_pb2_grpc, server_pb2_grpc
from darkroom_client._types.adapter import Adapter
from darkroom_client._types.model import Model
from darkroom_client._types.request import GenerationRequest
from darkroom_client._types.status import Estimate, ServerState
from darkroom_client.testing._adapters import Adapters
from darkroom_client.testing._behaviour import Behaviour
from darkroom_client.testing._catalogue import LoadError
from darkroom_client.testing._health import Health
from darkroom_client.testing._job import FakeJob
from darkroom_client.testing._jobs import JobRegistry
from darkroom_client.testing._models import fake_model
from darkroom_client.testing._services import Services

HANDLERS = 256

GRACE_SECONDS = 2.0
"""For the calls to end; gRPC cancels those that have not."""


class FakeServer:
    """Generates gradients at once, or follows its script; a context manager.

    ``models``: the models that it holds, as names (see ``fake_model``) or in full, such as
    ``client.models()`` of a real server. ``token``: required of every caller. ``capacity``:
    concurrent jobs; further requests are rejected as ``Overloaded``. ``port``: a port of 127.0.0.1;
    0 for any free one. ``adapters``: those on offer, which ``Client.adapters`` returns;
    ``addable_adapters``: those that ``Client.add_adapter`` can add. ``load_errors``: why the load
    of a model fails that is not in memory, by the model's id, as in
    ``{"sdxl": ModelUnusable("its VAE is missing")}``; it may be changed later. ``admin``: whether
    callers may load, unload and pin models, and add and remove adapters.

    It rejects the requests that a Darkroom server with these models rejects, but it does not decode
    images: a damaged one is accepted, and an image does not decide the size of the result. All
    callers share its jobs and uploads. It keeps results until ``restart``. JPEG and WebP need
    Pillow; without it they are an ``InvalidRequest``, and previews are PNG.

    Raises ``OSError`` on entry if ``port`` is in use, and ``ValueError`` without a model or if two
    have one name.
    """

    def __init__(
        self,
        *,
        models: Iterable[str | Model] = ("demo",),
        token: str | None = None,
        capacity: int | None = None,
        adapters: Iterable[Adapter] = (),
        addable_adapters: Iterable[Adapter] = (),
        load_errors: Mapping[str, LoadError] = MappingProxyType({}),
        admin: bool = True,
        port: int = 0,
    ) -> None:
        self.estimate = Estimate(queue_wait=0.0, run_time=1.0, peak_bytes=0, available_bytes=2**30)
        self._registry = JobRegistry(
            capacity, _distinct(models), load_errors, Adapters(adapters, addable_adapters)
        )
        self._services = Services(self._registry, lambda: self.estimate, token, admin=admin)
        self._health = Health(self._registry)
        self._port = port
        self._server: grpc.Server | None = None
        self._handlers: ThreadPoolExecutor | None = None

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
        with self._registry.changed:
            self._registry.state = state
            self._registry.changed.notify_all()

    @property
    def load_errors(self) -> dict[str, LoadError]:
        """Why the load of a model fails, by its id; may be changed."""
        return self._registry.catalogue.errors

    @property
    def backlog(self) -> float | None:
        """Seconds of work that answers report to balancing clients; may be set, None: no report."""
        return self._services.backlog

    @backlog.setter
    def backlog(self, seconds: float | None) -> None:
        self._services.backlog = seconds

    @property
    def jobs(self) -> tuple[FakeJob, ...]:
        """Every job since the start, also before ``restart``, oldest first."""
        with self._registry.changed:
            return tuple(self._registry.jobs)

    @property
    def requests(self) -> tuple[GenerationRequest, ...]:
        """The requests of those jobs."""
        return tuple(job.request for job in self.jobs)

    @property
    def uploads(self) -> tuple[bytes, ...]:
        """The files of the images that callers uploaded, without those that were forgotten."""
        with self._registry.changed:
            return tuple(self._registry.uploads.files.values())

    def forget_uploads(self) -> None:
        """Remove every uploaded image, as a server does that needs the room."""
        with self._registry.changed:
            self._registry.uploads.files.clear()

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

    def __repr__(self) -> str:
        state = self.state if self._server is not None else "stopped"
        with self._registry.changed:
            running, jobs = self._registry.running(), len(self._registry.jobs)
            models = ", ".join(model.id for model in self._registry.catalogue.models)
        return f"<FakeServer {self.target} {state}: {models}; {running} of {jobs} jobs run>"

    def _listen(self) -> None:
        self._check_port()
        self._registry.closing = False
        self._handlers = ThreadPoolExecutor(HANDLERS)
        # No SO_REUSEPORT, or a second server could share the port.
        server = grpc.server(self._handlers, options=(("grpc.so_reuseport", 0),))
        services: Any = self._services
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(services, server)
        image_pb2_grpc.add_ImageServiceServicer_to_server(services, server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(services, server)
        server_pb2_grpc.add_ServerServiceServicer_to_server(services, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self._port = server.add_insecure_port(self.target)
        self._services.server_id = self.target
        server.start()
        self._server = server

    def _check_port(self) -> None:
        """Raise ``OSError`` if the port is in use: C-core would write a line to stderr as well."""
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self._port))
            except OSError as error:
                raise OSError(error.errno, f"{error.strerror}: {self.target}") from None

    def _stop(self) -> None:
        if self._server is not None and self._handlers is not None:
            # Cancelling the calls would make C-core write a line to stderr: end them here.
            stopped = self._server.stop(GRACE_SECONDS)
            with self._registry.changed:
                self._registry.closing = True
                self._registry.changed.notify_all()
            stopped.wait()
            self._handlers.shutdown()
            self._server = self._handlers = None


def _distinct(models: Iterable[str | Model]) -> list[Model]:
    held = [fake_model(model) if isinstance(model, str) else model for model in models]
    ids = [model.id for model in held]
    if len(set(ids)) < len(held) or not held:
        raise ValueError(f"models {ids}: give at least one, each once")
    return held
