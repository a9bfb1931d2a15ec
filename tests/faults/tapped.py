"""A real server with a real engine process, which a test can signal at chosen events."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from darkroom.v1 import generation_pb2, generation_pb2_grpc, model_pb2_grpc
from darkroom_server.app import EngineLost, Server
from darkroom_server.backends.process import ProcessEngine
from darkroom_server.core.events import Event
from darkroom_server.settings import Dispatch, Engine, Models, Network, Settings
from darkroom_server.settings.adapters import Adapters
from darkroom_server.settings.sources import adapter_places, engine_configs
from tests.engine.conftest import config_for

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class TappedEngine(ProcessEngine):
    """``on_event`` sees each event before the server does, on the thread that reads the pipe."""

    on_event: Callable[[Event], None] = staticmethod(lambda _: None)

    def start(self, emit: Callable[[Event], None]) -> None:
        def tap(event: Event) -> None:
            self.on_event(event)
            emit(event)

        super().start(tap)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to the engine's process, if it runs."""
        if self.pid is not None:
            os.kill(self.pid, number)


class Wire:
    """The calls of a test to a running server."""

    def __init__(
        self,
        server: Server,
        serve: asyncio.Task[None],
        engine: TappedEngine,
        channel: grpc.aio.Channel,
    ) -> None:
        self.server = server
        self.serve = serve
        self.engine = engine
        self._channel: Any = channel
        self._stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
        self.models: Any = model_pb2_grpc.ModelServiceStub(channel)

    def stream(self, **fields: Any) -> Any:
        """A call of ``GenerateStream``."""
        usual = {"prompt": "a small heart", "steps": 6, "seed": 7, "exact": True}
        generation = generation_pb2.GenerateRequest(**{**usual, **fields})
        request = generation_pb2.GenerateStreamRequest(generation=generation)
        return self._stub.GenerateStream(request, timeout=120)

    async def cancel(self, request_id: str) -> bool:
        request = generation_pb2.CancelGenerationRequest(request_id=request_id)
        return bool((await self._stub.CancelGeneration(request)).cancelled)

    async def generate(self, **fields: Any) -> generation_pb2.GenerateResponse:
        usual = {"prompt": "a small heart", "steps": 6, "seed": 7, "exact": True}
        request = generation_pb2.GenerateRequest(**{**usual, **fields})
        response: generation_pb2.GenerateResponse = await self._stub.Generate(request, timeout=120)
        return response

    async def health_becomes(self, status: int) -> None:
        stub: Any = health_pb2_grpc.HealthStub(self._channel)
        call = stub.Watch(health_pb2.HealthCheckRequest())
        async for response in call:
            if response.status == status:
                break
        call.cancel()

    async def alive(self) -> bool:
        stub: Any = health_pb2_grpc.HealthStub(self._channel)
        response = await stub.Check(health_pb2.HealthCheckRequest(service="liveness"))
        return bool(response.status == SERVING)


@asynccontextmanager
async def serving(
    folder: Path,
    *,
    dispatch: Dispatch | None = None,
    adapters: Adapters | None = None,
    **engine: Any,
) -> AsyncIterator[Wire]:
    """A server with the model in ``folder``; ``engine`` holds settings of the engine section."""
    settings = Settings(
        models=Models(model=(f"tiny={folder}",)),
        network=Network(port=0, metrics_port=0),
        engine=Engine(**{"engine_timeout": 60.0, **engine}),
        dispatch=dispatch or Dispatch(max_queued_jobs=64),
        adapters=adapters or Adapters(),
    )
    assert engine_configs(settings, None)[0].models[0].id == "tiny"
    places = adapter_places(settings)
    config = config_for(
        folder, rows=4, adapters=places.sources(), adapters_may_come=places.configured
    )
    tapped = TappedEngine(config, timeout=settings.engine.engine_timeout)
    async with serving_with(tapped, settings) as wire:
        yield wire


@asynccontextmanager
async def serving_with(tapped: TappedEngine, settings: Settings) -> AsyncIterator[Wire]:
    """A server with that engine, once it serves; it ends with the block, if it has not before."""
    server = Server(settings, [tapped])
    await server.startup()
    serve = asyncio.create_task(server.serve())
    async with grpc.aio.insecure_channel(server.address) as channel:
        wire = Wire(server, serve, tapped, channel)
        try:
            await wire.health_becomes(SERVING)
            yield wire
        finally:
            server.stop()
            with suppress(EngineLost):
                await serve
            await server.shutdown()
