"""More streams than a connection may have, and a cancel beside them."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack

import grpc
import pytest

from darkroom_client import Accepted, AsyncClient, Client
from darkroom_client._transport.channels import CALLS_PER_PAIR
from darkroom_server.rpc import server as rpc_server
from darkroom_server.rpc.limits import OPTIONS
from darkroom_server.settings import Dispatch, Shutdown
from tests.server.wire import Wire, serving

STREAMS = 150
PER_CONNECTION = 100


@pytest.fixture
async def wire(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Wire]:
    """A server whose connections may have 100 streams, and whose engine finishes nothing."""
    options = {**dict(OPTIONS), "grpc.max_concurrent_streams": PER_CONNECTION}
    monkeypatch.setattr(rpc_server, "OPTIONS", tuple(options.items()))
    async with serving(
        dispatch=Dispatch(max_queued_jobs=400), shutdown=Shutdown(grace=0.1)
    ) as wire:
        yield wire


def test_the_limit_of_the_client_is_below_that_of_a_server() -> None:
    assert CALLS_PER_PAIR + 2 <= PER_CONNECTION


async def test_a_cancel_beside_150_streams_takes_less_than_a_second(wire: Wire) -> None:
    async with AsyncClient(wire.server.address) as client, AsyncExitStack() as streams:
        opened = []
        for index in range(STREAMS):
            stream = client.stream(f"star {index}", timeout=300.0)
            opened.append(await streams.enter_async_context(stream))
        firsts = await asyncio.gather(*(anext(stream) for stream in opened))

        began = time.monotonic()
        assert await client.cancel(opened[-1].request_id)
        seconds = time.monotonic() - began

        assert all(isinstance(first, Accepted) for first in firsts)
        assert wire.server.dispatcher.counts.live >= STREAMS - 1
        assert seconds < 1.0
        assert (await client.status()).accepted_jobs == STREAMS


async def test_the_blocking_client_does_that_too(wire: Wire) -> None:
    def cancel_beside_streams() -> float:
        with Client(wire.server.address) as client, ExitStack() as streams:
            opened = [
                streams.enter_context(client.stream(f"star {index}", timeout=300.0))
                for index in range(STREAMS)
            ]
            for stream in opened:
                assert isinstance(next(stream), Accepted)
            began = time.monotonic()
            assert client.cancel(opened[-1].request_id)
            seconds = time.monotonic() - began
            assert client.status().accepted_jobs == STREAMS
            return seconds

    assert await asyncio.to_thread(cancel_beside_streams) < 1.0


async def test_150_calls_of_generate_do_not_block_a_cancel(wire: Wire) -> None:
    async with AsyncClient(wire.server.address) as client:
        calls = [
            asyncio.create_task(client.generate(f"star {index}", request_id=f"r-{index}"))
            for index in range(STREAMS)
        ]
        await wire.becomes(lambda: wire.server.dispatcher.counts.live == STREAMS)

        began = time.monotonic()
        assert await client.cancel("r-149")
        assert time.monotonic() - began < 1.0
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)


async def test_places_are_free_again_when_calls_end(wire: Wire) -> None:
    async with AsyncClient(wire.server.address) as client:
        for _ in range(2 * CALLS_PER_PAIR // 10):
            calls = [asyncio.create_task(client.submit(f"star {i}")) for i in range(10)]
            await asyncio.gather(*calls)

        assert len(client._transport._pairs) == 1


async def test_the_server_does_limit_streams(wire: Wire) -> None:
    """The negative control: one connection without a limit of its own does wait."""
    async with grpc.aio.insecure_channel(wire.server.address) as channel:
        wire.channel = channel
        streams = [wire.stream(f"star {index}") for index in range(PER_CONNECTION + 1)]
        await wire.becomes(lambda: wire.server.dispatcher.counts.live == PER_CONNECTION)
        # Whichever is the last to arrive.
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await asyncio.gather(*(stream.read() for stream in streams))
        assert wire.server.dispatcher.counts.live == PER_CONNECTION
        for stream in streams:
            stream.cancel()
