"""The gRPC server: its port, its services, its limits."""

import asyncio
import socket
from typing import Protocol

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from darkroom.v1 import (
    generation_pb2,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)
from darkroom_server.core.errors import StartupError
from darkroom_server.dispatch import Dispatcher, ResultStore
from darkroom_server.rpc.generation import GenerationService
from darkroom_server.rpc.health import Health
from darkroom_server.rpc.interceptors.auth import Auth, AuthObserver
from darkroom_server.rpc.interceptors.decoding import Decoding
from darkroom_server.rpc.interceptors.errors import Errors
from darkroom_server.rpc.interceptors.in_flight import InFlightCalls
from darkroom_server.rpc.interceptors.request_ids import RequestIds
from darkroom_server.rpc.interceptors.telemetry import CallObserver, Telemetry
from darkroom_server.rpc.interceptors.traces import Traces
from darkroom_server.rpc.limits import LONGEST_CALL_SECONDS, OPTIONS
from darkroom_server.rpc.models import ModelService
from darkroom_server.rpc.status import ServerService
from darkroom_server.rpc.summary import RequestObserver
from darkroom_server.security.tokens import Tokens

FLUSH_SECONDS = 1.0
"""Long enough to send what handlers have answered, once none of them runs any more."""


def _try(host: str, port: int) -> None:
    """Raise the ``OSError`` that says why a port cannot be had: gRPC tells only its own log."""
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)


class Observer(RequestObserver, CallObserver, AuthObserver, Protocol):
    """Is told of requests, of calls, and of those that are not let in."""


class RpcServer:
    """Serves the dispatcher's models; made and used on one event loop, and at most once.

    With ``tokens``, callers need one; with ``credentials``, the port speaks TLS only. Clients get
    ``server_id`` with each accepted job; unset, it is the host's name and the port.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        requests: ResultStore,
        observer: Observer,
        *,
        reflect: bool = True,
        log_prompts: bool = False,
        server_id: str | None = None,
        begin_traces: bool = False,
        tokens: Tokens | None = None,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        self.health = Health()
        self._credentials = credentials
        self._server_id = server_id
        self._closing: asyncio.Task[None] | None = None
        self._running = InFlightCalls()
        interceptors = [
            Telemetry(observer),
            self._running,
            Errors(),
            RequestIds(),
            Traces(begin=begin_traces),
        ]
        if tokens is not None:
            interceptors.append(Auth(tokens, observer))
        interceptors.append(Decoding())
        self._server = grpc.aio.server(interceptors=interceptors, options=OPTIONS)
        self._generation = GenerationService(
            dispatcher, requests, observer, log_prompts=log_prompts
        )
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self._generation, self._server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(dispatcher), self._server)
        server_pb2_grpc.add_ServerServiceServicer_to_server(ServerService(dispatcher), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health.servicer, self._server)
        if reflect:
            names = [
                generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
                model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
                server_pb2.DESCRIPTOR.services_by_name["ServerService"].full_name,
                health.SERVICE_NAME,
                reflection.SERVICE_NAME,
            ]
            reflection.enable_server_reflection(names, self._server)

    async def start(self, host: str, port: int) -> str:
        """Open the port (0 picks one) and serve, alive and not ready; returns the address.

        Raises ``StartupError`` where the port cannot be had.
        """
        try:
            _try(host, port)
            host = f"[{host}]" if ":" in host else host
            bound = self._bind(f"{host}:{port}")
        except (OSError, RuntimeError) as error:
            why = error.strerror if isinstance(error, OSError) else "gRPC cannot have it"
            raise StartupError(
                f"cannot listen on {host}:{port}: {why}; choose another with --port or --host"
            ) from None
        self._generation.server_id = self._server_id or f"{socket.gethostname()}:{bound}"
        await self.health.alive()
        await self._server.start()
        return f"{host}:{bound}"

    def _bind(self, address: str) -> int:
        if self._credentials is None:
            return self._server.add_insecure_port(address)
        return self._server.add_secure_port(address, self._credentials)

    def close_port(self) -> None:
        """Take no more connections, and send the clients of those there are elsewhere.

        What runs goes on, until ``stop``.
        """
        self._closing = asyncio.create_task(self._server.stop(LONGEST_CALL_SECONDS))

    async def stop(self, grace: float) -> None:
        """Let running handlers answer for ``grace`` seconds at most, and close the port."""
        await self._running.wait_for_none(grace)
        await self._server.stop(FLUSH_SECONDS)
        if self._closing is not None:
            await self._closing
