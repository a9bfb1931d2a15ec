import asyncio
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from darkroom_server.settings import Engine, Network, Shutdown
from tests.server.wire import NOT_SERVING, SERVING, Wire, serving

NO_RESTARTS = Engine(engine_max_restarts=0)
ACCEPTING = "darkroom.v1.GenerationService"
READY = ["", ACCEPTING]


async def test_readiness_follows_the_engine_and_liveness_does_not() -> None:
    async with serving(wait=False, fake={"load": False}, engine=NO_RESTARTS) as wire:
        for service in READY:
            assert await wire.health(service) == NOT_SERVING
        assert await wire.health("liveness") == SERVING
        wire.engine.become_ready()
        for service in READY:
            await wire.health_becomes(SERVING, service)
        wire.engine.die()
        for service in READY:
            await wire.health_becomes(NOT_SERVING, service)
        assert await wire.health("liveness") == SERVING


async def test_readiness_returns_with_the_engine() -> None:
    async with serving() as wire:
        wire.engine.die()
        await wire.health_becomes(NOT_SERVING)
        assert await wire.health("liveness") == SERVING
        await wire.health_becomes(SERVING)


async def test_jobs_that_wait_for_an_engine_are_accepted() -> None:
    async with serving(fake={"auto": True}) as wire:
        wire.engine.die()
        await wire.health_becomes(NOT_SERVING)
        assert await wire.health(ACCEPTING) == SERVING
        assert (await wire.generate()).images


async def test_a_server_that_shuts_down_is_not_ready_before_it_rejects_jobs() -> None:
    async with serving(fake={"auto": True}, shutdown=Shutdown(drain_delay=60)) as wire:
        wire.server.stop()
        await wire.serve
        shutdown = asyncio.create_task(wire.server.shutdown())
        for service in READY:
            await wire.health_becomes(NOT_SERVING, service)
        wire.engine.die()
        assert (await wire.generate()).images
        # The restarted engine does not make the server ready again.
        for service in READY:
            assert await wire.health(service) == NOT_SERVING
        shutdown.cancel()
        with pytest.raises(asyncio.CancelledError):
            await shutdown
        await wire.server.dispatcher.drain(0)


async def test_unknown_services_are_not_found() -> None:
    async with serving() as wire:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await wire.health("nothing")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def reflected(wire: Wire) -> set[str]:
    channel: Any = wire.channel  # The types know the synchronous channel only.
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async for response in stub.ServerReflectionInfo(iter([request])):
        return {service.name for service in response.list_services_response.service}
    raise AssertionError("no answer")


async def test_reflection_lists_the_services() -> None:
    async with serving() as wire:
        assert await reflected(wire) >= {
            "darkroom.v1.GenerationService",
            "darkroom.v1.ModelService",
            "darkroom.v1.ServerService",
            "grpc.health.v1.Health",
        }


async def test_reflection_can_be_turned_off() -> None:
    async with serving(network=Network(port=0, metrics_port=0, reflection=False)) as wire:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reflected(wire)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
