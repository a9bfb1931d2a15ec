"""A complete server on port 0 with the fake engine, and a channel to it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from darkroom.v1 import generation_pb2, generation_pb2_grpc, model_pb2_grpc
from darkroom_server.app import EngineLost, Server
from darkroom_server.backends.fake import FakeEngine
from darkroom_server.core.caller import ANONYMOUS
from darkroom_server.core.errors import StartupError
from darkroom_server.core.job import Job
from darkroom_server.dispatch import JobOutcome
from darkroom_server.settings import Network, Settings

if TYPE_CHECKING:
    from darkroom.v1.generation_pb2_grpc import GenerationServiceAsyncStub
    from darkroom.v1.model_pb2_grpc import ModelServiceAsyncStub

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass
class Wire:
    """A running server, its engine, and a client's channel.

    ``submitted`` and ``cancelled`` receive each job and each cancelled id as the engine gets it.
    """

    server: Server
    engine: FakeEngine
    submitted: asyncio.Queue[Job]
    cancelled: asyncio.Queue[str]
    channel: grpc.aio.Channel
    serve: asyncio.Task[None]

    @property
    def generation(self) -> "GenerationServiceAsyncStub":
        return generation_pb2_grpc.GenerationServiceStub(self.channel)

    @property
    def models(self) -> "ModelServiceAsyncStub":
        return model_pb2_grpc.ModelServiceStub(self.channel)

    async def generate(self, prompt: str = "a star", **fields: Any) -> Any:
        request = generation_pb2.GenerateRequest(prompt=prompt, **fields)
        return await self.generation.Generate(request)

    def generating(self, prompt: str = "a star", **fields: Any) -> "asyncio.Task[Any]":
        return asyncio.create_task(self.generate(prompt, **fields))

    def stream(self, prompt: str = "a star", *, preview_every: int = 0, **fields: Any) -> Any:
        """A call of ``GenerateStream``: an iterator over its responses."""
        request = generation_pb2.GenerateStreamRequest(
            generation=generation_pb2.GenerateRequest(prompt=prompt, **fields)
        )
        if preview_every:
            request.preview.every_steps = preview_every
        return self.generation.GenerateStream(request)

    async def becomes(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` of the server holds; the server runs in this event loop."""
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.005)

    async def counted(self, end: JobOutcome) -> None:
        """Wait until a job has ended with outcome ``end``."""
        await self.becomes(lambda: self.server.dispatcher.counts.by_end[end] > 0)

    async def subscribers(self, request_id: str, count: int, caller: str = ANONYMOUS.name) -> None:
        """Wait until a job has ``count`` subscriptions."""
        active = self.server.results.find(caller, request_id)
        await self.becomes(lambda: active.subscribers == count)

    async def health(self, service: str = "") -> int:
        stub: Any = health_pb2_grpc.HealthStub(self.channel)
        response = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        status: int = response.status
        return status

    async def health_becomes(self, status: int, service: str = "") -> None:
        stub: Any = health_pb2_grpc.HealthStub(self.channel)
        call = stub.Watch(health_pb2.HealthCheckRequest(service=service))
        async for response in call:
            if response.status == status:
                break
        call.cancel()


@asynccontextmanager
async def serving(
    *,
    wait: bool = True,
    fake: dict[str, Any] | None = None,
    channel: Callable[[str], grpc.aio.Channel] = grpc.aio.insecure_channel,
    **sections: Any,
) -> AsyncIterator[Wire]:
    """A running server; ``fake`` holds its engine's arguments, ``sections`` those of ``Settings``.

    ``wait`` waits until the server is ready. ``channel`` makes the channel of the ``Wire`` from
    the server's address.
    """
    submitted: asyncio.Queue[Job] = asyncio.Queue()
    cancelled: asyncio.Queue[str] = asyncio.Queue()
    engine = FakeEngine(
        on_submit=submitted.put_nowait, on_cancel=cancelled.put_nowait, **(fake or {})
    )
    settings = Settings(**{"network": Network(port=0, metrics_port=0), **sections})
    server = Server(settings, [engine])
    await server.startup()
    serve = asyncio.create_task(server.serve())
    async with channel(server.address) as opened:
        wire = Wire(server, engine, submitted, cancelled, opened, serve)
        try:
            if wait:
                await wire.health_becomes(SERVING)
            yield wire
        finally:
            server.stop()
            with suppress(EngineLost, StartupError):
                await serve
            await server.shutdown()


@dataclass
class Refusal:
    """A call's error, with its details unpacked."""

    code: grpc.StatusCode
    message: str
    status: status_pb2.Status
    trailers: dict[str, Any]

    def detail(self, kind: Any) -> Any:
        for packed in self.status.details:
            if packed.Is(kind.DESCRIPTOR):
                detail = kind()
                packed.Unpack(detail)
                return detail
        raise AssertionError(f"no {kind.__name__} in {self.status}")

    @property
    def info(self) -> Any:
        return self.detail(error_details_pb2.ErrorInfo)

    @property
    def violations(self) -> dict[str, str]:
        bad = self.detail(error_details_pb2.BadRequest)
        return {violation.field: violation.description for violation in bad.field_violations}


async def refusal(call: Any) -> Refusal:
    """The error that ``call`` ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = caught.value
    # The types know the synchronous call only.
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None, f"{error.code()}: {error.details()}"
    return Refusal(
        error.code(), error.details() or "", status, dict(list(error.trailing_metadata()))
    )
