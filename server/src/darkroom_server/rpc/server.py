"""The gRPC server: its port, its services, its limits."""

import asyncio
import socket

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

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
from darkroom_server.core.caller import ANONYMOUS, Caller
from darkroom_server.core.errors import StartupError
from darkroom_server.dispatch import Dispatcher, PeerAddresses
from darkroom_server.rpc.dropped_calls import DroppedCalls
from darkroom_server.rpc.generation import GenerationServicer
from darkroom_server.rpc.health import Health
from darkroom_server.rpc.images import ImageServicer
from darkroom_server.rpc.interceptors.auth import OPEN, Auth, AuthObserver
from darkroom_server.rpc.interceptors.call_context import CallContexts
from darkroom_server.rpc.interceptors.errors import Errors
from darkroom_server.rpc.interceptors.in_flight import InFlightCalls
from darkroom_server.rpc.interceptors.receiving import Decoding, Receiving
from darkroom_server.rpc.interceptors.stalled_readers import StalledReaders
from darkroom_server.rpc.interceptors.telemetry import CallObserver, Telemetry
from darkroom_server.rpc.limits import LONGEST_CALL_SECONDS, OPTIONS
from darkroom_server.rpc.models import ModelServicer
from darkroom_server.rpc.status import ServerServicer
from darkroom_server.security.admin_policy import AdminPolicy
from darkroom_server.security.tokens import Tokens
from darkroom_server.service.generation import GenerationService
from darkroom_server.service.uploads import UploadService

FLUSH_SECONDS = 1.0
"""Enough to send the answers of the handlers, once none of them runs."""

CANCEL_SECONDS = 5.0
"""For gRPC to end the calls that it cancels after that: nothing that a caller does delays it."""


def probe_port(host: str, port: int) -> None:
    """Raise the ``OSError`` that says why a port cannot be bound: gRPC writes it to its own log."""
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)


class RpcServer:
    """Serves ``service`` and ``uploads`` over gRPC; made and used on one event loop, at most once.

    With ``tokens``, callers need one; without, each is ``anonymous`` with its own address of
    ``addresses``. With ``credentials``, the port accepts TLS only. Clients
    receive ``server_id`` with each accepted job; None means the host's name and the port.
    """

    def __init__(
        self,
        service: GenerationService,
        uploads: UploadService,
        dispatcher: Dispatcher,
        calls: CallObserver,
        rejections: AuthObserver,
        *,
        reflect: bool = True,
        server_id: str | None = None,
        begin_traces: bool = False,
        tokens: Tokens | None = None,
        addresses: PeerAddresses | None = None,
        anonymous: Caller = ANONYMOUS,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        self.health = Health()
        self._credentials = credentials
        self._server_id = server_id
        self._generation = GenerationServicer(service)
        self._closing: asyncio.Task[None] | None = None
        self._in_flight = InFlightCalls()
        self.dropped_calls = DroppedCalls()
        addresses = addresses or PeerAddresses()
        auth = Auth(tokens, rejections) if tokens is not None else None
        interceptors: list[grpc.aio.ServerInterceptor] = [
            Receiving(
                addresses,
                auth.allows if auth is not None else None,
                OPEN,
                self.dropped_calls,
            ),
            Telemetry(calls),
            self._in_flight,
            Errors(),
            CallContexts(addresses, anonymous, dispatcher.backlog, begin_traces=begin_traces),
        ]
        if auth is not None:
            interceptors.append(auth)
        interceptors += [StalledReaders(), Decoding()]
        self._server = grpc.aio.server(interceptors=interceptors, options=OPTIONS)
        self.dropped_calls.watch_newest_server()
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self._generation, self._server)
        image_pb2_grpc.add_ImageServiceServicer_to_server(ImageServicer(uploads), self._server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(
            ModelServicer(dispatcher, AdminPolicy(tokens=tokens is not None)), self._server
        )
        server_pb2_grpc.add_ServerServiceServicer_to_server(
            ServerServicer(dispatcher), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        if reflect:
            names = [
                generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
                image_pb2.DESCRIPTOR.services_by_name["ImageService"].full_name,
                model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
                server_pb2.DESCRIPTOR.services_by_name["ServerService"].full_name,
                health.SERVICE_NAME,
                reflection.SERVICE_NAME,
            ]
            reflection.enable_server_reflection(names, self._server)

    async def start(self, host: str, port: int) -> str:
        """Open the port (0 picks one) and serve, alive and not ready; returns the address.

        Raises ``StartupError`` if the port cannot be bound.
        """
        try:
            probe_port(host, port)
            host = f"[{host}]" if ":" in host else host
            bound = self._bind(f"{host}:{port}")
        except (OSError, RuntimeError) as error:
            why = error.strerror if isinstance(error, OSError) else "gRPC cannot have it"
            raise StartupError(
                f"cannot listen on {host}:{port}: {why}; choose another with --port or --host"
            ) from None
        self._generation.server_id = self._server_id or f"{socket.gethostname()}:{bound}"
        await self._server.start()
        return f"{host}:{bound}"

    def _bind(self, address: str) -> int:
        if self._credentials is None:
            return self._server.add_insecure_port(address)
        return self._server.add_secure_port(address, self._credentials)

    def close_port(self) -> None:
        """Accept no more connections, and send connected clients elsewhere (GOAWAY).

        Running calls continue until ``stop``.
        """
        self._closing = asyncio.create_task(self._server.stop(LONGEST_CALL_SECONDS))

    async def stop(self, grace: float) -> None:
        """Give running handlers at most ``grace`` seconds, then close the port.

        Raises ``TimeoutError`` if gRPC does not end the remaining calls in time.
        """
        await self._in_flight.wait_for_none(grace)
        async with asyncio.timeout(FLUSH_SECONDS + CANCEL_SECONDS):
            await self._server.stop(FLUSH_SECONDS)
            if self._closing is not None:
                await self._closing
