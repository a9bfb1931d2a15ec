"""Idle connections, half-open connections, and bytes that are not gRPC."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from tests.server.hostile.http2 import PREFACE, SETTINGS, frame
from tests.server.hostile.leaks import nothing_leaks
from tests.server.security.certificates import Authority
from tests.server.wire import Wire, serving

AUTO = {"auto": True}
TLS_HELLO = bytes.fromhex("16030100050100000103")


async def connect(wire: Wire, *chunks: bytes) -> asyncio.StreamWriter:
    host, _, port = wire.server.address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    for chunk in chunks:
        writer.write(chunk)
    return writer


async def close(writers: list[asyncio.StreamWriter]) -> None:
    for writer in writers:
        writer.close()
    await asyncio.gather(*(w.wait_closed() for w in writers), return_exceptions=True)


@pytest.mark.parametrize(
    "opening",
    [
        b"",
        PREFACE[:10],
        PREFACE,
        PREFACE + SETTINGS,
        PREFACE + SETTINGS + frame(1, 0, 1, b""),  # Headers that never end.
        PREFACE + SETTINGS + frame(0, 0, 7, b"x" * 100),  # Data of an unknown stream.
    ],
    ids=["nothing", "half a preface", "preface", "settings", "headers", "data"],
)
async def test_half_open_connections_affect_no_other_caller(opening: bytes) -> None:
    async with serving(fake=AUTO) as wire:
        await wire.generate()
        async with nothing_leaks():
            writers = [await connect(wire, opening) for _ in range(200)]
            assert (await wire.generate()).images
            await close(writers)
        assert (await wire.generate()).images


@pytest.mark.parametrize("tls", [False, True], ids=["plaintext", "tls"])
async def test_garbage_affects_no_other_caller(tls: bool, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    secured: dict[str, Any] = (
        {"security": authority.security(), "channel": authority.channel()} if tls else {}
    )
    dice = random.Random(7)
    async with serving(fake=AUTO, **secured) as wire:
        await wire.generate()
        async with nothing_leaks():
            writers = []
            for number in range(200):
                start = (b"", PREFACE, PREFACE + SETTINGS, TLS_HELLO, b"GET / HTTP/1.1\r\n\r\n")
                noise = dice.randbytes(dice.randrange(4096))
                writers.append(await connect(wire, start[number % len(start)], noise))
            assert (await wire.generate()).images
            await close(writers)
        assert (await wire.generate()).images


async def test_random_frames_affect_no_other_caller() -> None:
    dice = random.Random(7)
    async with serving(fake=AUTO) as wire:
        await wire.generate()
        async with nothing_leaks():
            writers = []
            for _ in range(200):
                frames = [
                    frame(
                        dice.randrange(12),
                        dice.randrange(256),
                        dice.randrange(8),
                        dice.randbytes(dice.randrange(64)),
                    )
                    for _ in range(20)
                ]
                writers.append(await connect(wire, PREFACE + SETTINGS, *frames))
            assert (await wire.generate()).images
            await close(writers)
        assert (await wire.generate()).images
