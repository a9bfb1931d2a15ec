"""More calls at once than gRPC keeps by default for a server that is busy."""

import asyncio
import time
from collections import Counter
from contextlib import AsyncExitStack

import grpc
import pytest

from darkroom.v1 import model_pb2
from darkroom_server.rpc import dropped_calls
from darkroom_server.rpc import server as rpc_server
from darkroom_server.rpc.limits import OPTIONS
from tests.server.hostile.http2 import DATA, END_STREAM, HEADERS, RST_STREAM, Peer, peer
from tests.server.telemetry.scrape import counted, values
from tests.server.wire import Wire, serving

LIST = "darkroom.v1.ModelService/ListModels"
CONNECTIONS, CALLS = 15, 100
EMPTY = model_pb2.ListModelsRequest().SerializeToString()


async def ends(stranger: Peer) -> Counter[str]:
    """How the calls of one connection end: "answered" with a message, or "lost"."""
    answered: set[int] = set()
    ended: set[int] = set()
    async for kind, flags, stream, _ in stranger.frames():
        if kind == DATA:
            answered.add(stream)
        if kind == RST_STREAM or (kind == HEADERS and flags & END_STREAM):
            ended.add(stream)
        if len(ended) == CALLS:
            break
    return Counter(answered=len(answered), lost=len(ended - answered))


async def burst(wire: Wire) -> Counter[str]:
    """Send all calls while the event loop is busy; how they end."""
    async with AsyncExitStack() as stack:
        strangers = [
            await stack.enter_async_context(peer(wire.server.address)) for _ in range(CONNECTIONS)
        ]
        for stranger in strangers:
            for _ in range(CALLS):
                stranger.open(LIST, data=EMPTY)
        time.sleep(0.4)  # gRPC's own threads receive the calls meanwhile.
        async with asyncio.timeout(60):
            return sum(await asyncio.gather(*map(ends, strangers)), Counter[str]())


async def test_no_call_of_a_burst_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropped_calls, "WINDOW_SECONDS", 0.1)
    async with serving(fake={"auto": True}) as wire:
        assert await burst(wire) == Counter(answered=CONNECTIONS * CALLS)
        assert await dropped(wire) == 0


async def test_calls_that_grpc_drops_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    default = tuple(option for option in OPTIONS if "max_pending_requests" not in option[0])
    monkeypatch.setattr(rpc_server, "OPTIONS", default)
    monkeypatch.setattr(dropped_calls, "WINDOW_SECONDS", 0.1)
    async with serving(fake={"auto": True}) as wire:
        counts = await burst(wire)
        assert counts["lost"] > 0
        assert await dropped(wire) == counts["lost"]


async def dropped(wire: Wire) -> float:
    """The counter, after two readings that are longer apart than its window."""
    await counted(wire, "darkroom_calls_dropped_total")
    await asyncio.sleep(0.2)
    return (await values(wire, "darkroom_calls_dropped_total"))[()]


async def test_a_client_with_more_calls_than_one_connection_may_have_loses_none() -> None:
    async with serving(fake={"auto": True}) as wire:
        calls = [wire.models.ListModels(model_pb2.ListModelsRequest()) for _ in range(1000)]
        codes = Counter(await asyncio.gather(*(call.code() for call in calls)))
        assert codes == Counter({grpc.StatusCode.OK: 1000})
