"""Callers that hold streams open, never read, cancel at once, or guess tokens."""

import asyncio
from contextlib import AsyncExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from darkroom.v1 import generation_pb2, generation_pb2_grpc, model_pb2, types_pb2
from darkroom_server.dispatch import JobOutcome
from darkroom_server.settings import Dispatch, Results, Security
from tests.server.hostile.leaks import nothing_leaks
from tests.server.wire import Wire, serving

ROOM = Dispatch(max_queued_jobs=1000)


def apart(wire: Wire) -> grpc.aio.Channel:
    """A channel with its own connection; by default the channels of one process share one."""
    return grpc.aio.insecure_channel(wire.server.address, (("grpc.use_local_subchannel_pool", 1),))


async def idle_watches(channel: grpc.aio.Channel, count: int) -> list[Any]:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    calls = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(count)]
    for call in calls:
        await call.read()
    return calls


async def idle_generations(channel: grpc.aio.Channel, count: int) -> list[Any]:
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    generation = generation_pb2.GenerateRequest(prompt="a star")
    request = generation_pb2.GenerateStreamRequest(generation=generation)
    calls: list[Any] = [stub.GenerateStream(request) for _ in range(count)]
    for call in calls:
        await call.read()
    return calls


@pytest.mark.parametrize("idle", [idle_watches, idle_generations])
async def test_500_idle_streams_affect_no_other_caller(idle: Any) -> None:
    async with serving(dispatch=ROOM) as wire:
        first = wire.generating()
        wire.engine.finish((await wire.submitted.get()).id)
        await first
        async with nothing_leaks(max_growth=64 << 20):  # One-time allocations of 500 streams.
            async with AsyncExitStack() as stack:
                calls = []
                for _ in range(5):  # Connections, of which each may have 100 calls.
                    calls += await idle(await stack.enter_async_context(apart(wire)), 100)
                assert len(calls) == 500
                # Another caller is served meanwhile.
                other = wire.generating(request_id="other")
                while (await wire.submitted.get()).id != "other":
                    wire.engine.advance()
                wire.engine.advance(4)
                assert (await other).images
                while calls:
                    calls.pop().cancel()
            wire.engine.advance(4)
        assert wire.server.dispatcher.running_jobs == wire.server.dispatcher.queued_jobs == 0


async def ignore_ten_streams(wire: Wire) -> None:
    """Start ten streams of 3 MiB and read none; the engine finishes them all the same."""
    generation = generation_pb2.GenerateRequest(
        prompt="a star",
        width=512,
        height=512,
        image_count=4,
        format=types_pb2.IMAGE_FORMAT_RAW_RGB,
    )
    request = generation_pb2.GenerateStreamRequest(generation=generation)
    counts = wire.server.dispatcher.counts
    finished = counts.by_end[JobOutcome.FINISHED]
    async with apart(wire) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        calls: list[Any] = [stub.GenerateStream(request) for _ in range(10)]
        await wire.becomes(lambda: counts.by_end[JobOutcome.FINISHED] == finished + 10)
        assert wire.server.dispatcher.running_jobs == 0
        assert (await wire.generate()).images
        assert not any(call.done() for call in calls)
        calls.clear()


async def test_readers_that_never_read_affect_no_other_caller() -> None:
    kept = Results(result_bytes=4 << 20)  # Else each round keeps 31 MiB, up to the default's 256.
    async with serving(fake={"auto": True}, dispatch=ROOM, results=kept) as wire:
        await ignore_ten_streams(wire)  # Warm-up: one-time allocations, such as gRPC's arenas.
        async with nothing_leaks():
            await ignore_ten_streams(wire)
        assert (await wire.generate()).images


async def test_a_reader_that_never_reads_does_not_delay_shutdown() -> None:
    raw = types_pb2.IMAGE_FORMAT_RAW_RGB
    async with serving(fake={"auto": True}) as wire:
        call = wire.stream(width=1024, height=1024, image_count=4, format=raw)
        await wire.becomes(lambda: wire.server.dispatcher.counts.by_end[JobOutcome.FINISHED] == 1)
        wire.server.stop()
        await wire.serve
        async with asyncio.timeout(60):
            await wire.server.shutdown()
        assert call


async def start_and_cancel(wire: Wire) -> None:
    """Start two thousand calls and cancel them at once."""
    request = generation_pb2.GenerateRequest(prompt="a star")
    async with apart(wire) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        for _ in range(20):
            calls = [stub.Generate(request) for _ in range(100)]
            await asyncio.sleep(0)
            while calls:
                calls.pop().cancel()
        assert (await wire.generate()).images
        counts = wire.server.dispatcher.counts
        await wire.becomes(lambda: counts.live == 0)
        assert counts.accepted == counts.ended


async def test_calls_cancelled_at_once_leak_nothing() -> None:
    async with serving(fake={"pass_seconds": 0.005}, dispatch=ROOM) as wire:
        await start_and_cancel(wire)  # Warm-up: one-time allocations, such as gRPC's arenas.
        async with nothing_leaks():
            await start_and_cancel(wire)


async def test_guessed_tokens_affect_no_other_caller(tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    file.write_text(f'[[token]]\nname = "a"\nsha256 = "{sha256(b"right").hexdigest()}"\n')
    async with serving(fake={"auto": True}, security=Security(tokens=str(file))) as wire:
        request = model_pb2.ListModelsRequest()

        async def code(token: str) -> grpc.StatusCode:
            call = wire.models.ListModels(request, metadata=(("authorization", f"Bearer {token}"),))
            result: grpc.StatusCode = await call.code()
            return result

        assert await code("right") is grpc.StatusCode.OK
        async with nothing_leaks():
            guesses = await asyncio.gather(*(code(f"guess-{n}") for n in range(1000)))
        assert set(guesses) == {grpc.StatusCode.UNAUTHENTICATED}
        assert await code("right") is grpc.StatusCode.OK
