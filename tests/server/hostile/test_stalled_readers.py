"""Streams that nobody reads: by hand-written frames, with a flow control window of 0."""

import asyncio

import pytest

from darkroom.v1 import generation_pb2
from darkroom_server.dispatch.admission import quotas
from darkroom_server.rpc.interceptors import stalled_readers
from tests.server.hostile.http2 import Peer, peer
from tests.server.rpc.test_call_limits import retry_while_exhausted
from tests.server.streams import kind, rest
from tests.server.telemetry.scrape import counted
from tests.server.wire import Wire, refusal, serving

CALLS = 8


@pytest.fixture(autouse=True)
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """One address may have ``CALLS`` calls."""
    monkeypatch.setattr(quotas, "BESIDES_JOBS", CALLS - 192)  # Of the 192 jobs by default.


def watch(stranger: Peer, wire: Wire) -> int:
    data = generation_pb2.WatchGenerationRequest(request_id="a").SerializeToString()
    return stranger.open("darkroom.v1.GenerationService/WatchGeneration", data=data)


async def begin(wire: Wire) -> None:
    generation = generation_pb2.GenerateRequest(prompt="a star", request_id="a")
    request = generation_pb2.SubmitGenerationRequest(generation=generation)
    await wire.generation.SubmitGeneration(request)


async def test_unread_watches_of_one_address_keep_no_other_address_out() -> None:
    async with serving(fake={"auto": True}) as wire:
        await begin(wire)
        async with peer(wire.server.address, window=0, source="127.0.0.2") as stranger:
            for _ in range(2 * CALLS):
                watch(stranger, wire)
            await asyncio.sleep(0.3)
            assert (await wire.generate()).images


async def test_a_stalled_watch_is_aborted_and_its_place_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stalled_readers, "STALL_SECONDS", 1.0)
    async with serving(fake={"auto": True}) as wire:
        await begin(wire)
        async with peer(wire.server.address, window=0) as stranger:
            streams = [watch(stranger, wire) for _ in range(CALLS)]
            await asyncio.sleep(0.3)
            assert (await refusal(wire.generate())).info.reason == "QUOTA_EXCEEDED"
            await asyncio.sleep(1.5)
            assert (await wire.generate()).images
            stranger.allow(streams[0], 1 << 20)  # It reads on, and learns what happened.
            async with asyncio.timeout(10):
                assert b"nobody read this stream" in await stranger.ended(streams[0])
            watched = ("darkroom.v1.GenerationService", "WatchGeneration")
            codes = await counted(
                wire, "grpc_server_handled_total", "grpc_service", "grpc_method", "grpc_code"
            )
            assert codes[(*watched, "UNAVAILABLE")] == CALLS


async def test_the_stalled_streams_of_one_address_are_limited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stalled_readers, "STALL_SECONDS", 0.2)
    monkeypatch.setattr(stalled_readers, "MAX_STALLED", CALLS)
    async with serving(fake={"auto": True}) as wire:
        await begin(wire)
        async with peer(wire.server.address, window=0) as stranger:
            for _ in range(CALLS):
                watch(stranger, wire)
            await asyncio.sleep(1.0)
            error = await refusal(wire.stream().read())
            assert error.info.reason == "QUOTA_EXCEEDED"
            assert str(CALLS) in error.message
        # Its connection is closed, and nothing remains of its streams.
        assert kind((await retry_while_exhausted(lambda: rest(wire.stream())))[-1]) == "finished"
