"""What callers without a valid token can make the server hold, by hand-written HTTP/2 frames."""

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from darkroom.v1 import generation_pb2, generation_pb2_grpc
from darkroom_server.rpc import server as rpc_server
from darkroom_server.rpc.interceptors import receiving
from darkroom_server.rpc.limits import OPTIONS
from darkroom_server.settings import Security
from tests.server.app.process import start
from tests.server.hostile.http2 import (
    DATA,
    END_STREAM,
    HEADERS,
    RST_STREAM,
    SETTINGS_FRAME,
    WINDOW_UPDATE,
    Peer,
    peer,
)
from tests.server.wire import serving

GENERATE = "darkroom.v1.GenerationService/Generate"
MIB = 1 << 20
UNFINISHED = struct.pack(">BI", 0, MIB) + b"a" * (MIB - 1)
"""A message of 1 MiB without its last byte."""


@pytest.fixture
def tokens(tmp_path: Path) -> Security:
    file = tmp_path / "tokens.toml"
    file.write_text(f'[[token]]\nname = "a"\nsha256 = "{sha256(b"right").hexdigest()}"\n')
    return Security(tokens=str(file))


@dataclass
class Target:
    """A server in its own process, so that its memory is its own."""

    address: str
    process: psutil.Process

    def rss(self) -> int:
        return self.process.memory_info().rss

    async def answers(self, service: str = "") -> bool:
        """Whether a health check is answered within a second."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            began = time.monotonic()
            await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            return time.monotonic() - began < 1.0


@contextmanager
def target(*flags: str) -> Iterator[Target]:
    with start("--log-format", "json", "--log-level", "info", *flags, auto=True) as process:
        serving = process.until("serving")
        yield Target(serving["address"], psutil.Process(process.pid))


async def hold_messages(stranger: Peer, calls: int) -> None:
    """Open calls that send their message as far as the server lets them, and never end it."""
    offsets = {stranger.open(GENERATE, data=None): 0 for _ in range(calls)}
    windows = dict.fromkeys(offsets, 65535)
    connection = 65535

    def push() -> None:
        nonlocal connection
        for stream, offset in offsets.items():
            while (size := min(16384, windows[stream], connection, len(UNFINISHED) - offset)) > 0:
                stranger.send(DATA, 0, stream, UNFINISHED[offset : offset + size])
                offset += size
                windows[stream] -= size
                connection -= size
            offsets[stream] = offset

    push()
    async for kind, flags, stream, payload in stranger.frames():
        if kind == WINDOW_UPDATE:
            if stream:
                windows[stream] += int.from_bytes(payload, "big")
            else:
                connection += int.from_bytes(payload, "big")
        elif kind == SETTINGS_FRAME and not flags & 1:
            for at in range(0, len(payload), 6):
                name, value = struct.unpack(">HI", payload[at : at + 6])
                if name == 4:
                    windows = {s: w + value - 65535 for s, w in windows.items()}
        elif kind == RST_STREAM or (kind == HEADERS and flags & END_STREAM):
            offsets.pop(stream, None)
        push()


@asynccontextmanager
async def unfinished_messages(address: str, connections: int) -> AsyncIterator[None]:
    """Connections of another address with 100 unfinished messages each, for a while."""
    async with AsyncExitStack() as stack:
        tasks = []
        for _ in range(connections):
            stranger = await stack.enter_async_context(peer(address, source="127.0.0.2"))
            tasks.append(asyncio.create_task(hold_messages(stranger, 100)))
        await asyncio.sleep(1.2)
        assert not any(task.done() for task in tasks)
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_messages_without_a_token_are_not_received(tokens: Security) -> None:
    with target("--tokens", str(tokens.tokens)) as server:
        before = server.rss()
        async with unfinished_messages(server.address, 5):
            assert server.rss() - before < 100 * MIB  # 500 MiB were offered.
            assert await server.answers()


async def test_unfinished_messages_take_bounded_memory_and_delay_no_other_address() -> None:
    with target() as server:
        before = server.rss()
        async with unfinished_messages(server.address, 5):
            assert server.rss() - before < 200 * MIB
            async with grpc.aio.insecure_channel(server.address) as channel:
                stub = generation_pb2_grpc.GenerationServiceStub(channel)
                request = generation_pb2.GenerateRequest(prompt="a star")
                assert (await stub.Generate(request, timeout=10)).images


async def test_a_message_must_arrive_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiving, "MESSAGE_SECONDS", 0.3)
    async with serving(fake={"auto": True}) as wire, peer(wire.server.address) as stranger:
        stream = stranger.open(GENERATE, data=None)
        stranger.send(DATA, 0, stream, UNFINISHED[:100])
        async with asyncio.timeout(10):
            assert b"did not arrive" in await stranger.ended(stream)
        assert (await wire.generate()).images


async def test_calls_without_a_token_are_limited_in_number(
    monkeypatch: pytest.MonkeyPatch, tokens: Security
) -> None:
    monkeypatch.setattr(receiving, "MAX_OPEN", 20)
    monkeypatch.setattr(receiving, "MAX_OPEN_PER_ADDRESS", 10)
    watch = "grpc.health.v1.Health/Watch"
    async with (
        serving(fake={"auto": True}, security=tokens) as wire,
        peer(wire.server.address, source="127.0.0.2") as stranger,
    ):
        for _ in range(20):
            stranger.open(watch)
        await asyncio.sleep(0.5)
        assert await wire.health()  # Another address.
        last = stranger.open(watch)
        async with asyncio.timeout(10):
            assert b"too many calls" in await stranger.ended(last)


async def test_a_connection_has_at_most_100_calls() -> None:
    async with serving() as wire, peer(wire.server.address) as stranger:
        async with asyncio.timeout(10):
            async for kind, flags, _, payload in stranger.frames():
                if kind == SETTINGS_FRAME and not flags & 1:
                    settings = {
                        struct.unpack(">HI", payload[at : at + 6])
                        for at in range(0, len(payload), 6)
                    }
                    assert (3, 100) in settings
                    break


async def test_connections_are_limited_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    few = tuple(
        (name, 5 if name == "grpc.max_allowed_incoming_connections" else value)
        for name, value in OPTIONS
    )
    monkeypatch.setattr(rpc_server, "OPTIONS", few)
    process = psutil.Process()
    async with serving(fake={"auto": True}) as wire, AsyncExitStack() as stack:
        before = process.num_fds()
        for _ in range(50):
            await stack.enter_async_context(peer(wire.server.address))
        await asyncio.sleep(1.0)
        # This process holds one end of all connections, and the other end of a few.
        assert process.num_fds() - before < 60
        assert (await wire.generate()).images
