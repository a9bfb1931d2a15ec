"""gRPC's core writes lines of its own to standard error, which strangers can cause."""

import asyncio
import json
import signal

from tests.server.app.process import start
from tests.server.hostile.http2 import (
    END_HEADERS,
    HEADERS,
    RST_STREAM,
    call_headers,
    header_block,
    peer,
)

GENERATE = "darkroom.v1.GenerationService/Generate"
CALLS = 90  # Within the streams of one connection.
ENDED = 25
"""Core ends about 40 of them, each with one line, and leaves the others without an answer."""
MOST_LINES = 40
"""The limit is 20 at once, and one in each second after that."""
FIRST = call_headers(GENERATE) + b"\x40" + header_block([(b"x-a", b"a" * 3900)])[1:]
"""Puts one field into the table of the header compression."""
LARGE = call_headers(GENERATE) + b"\xbe" * 2000
"""Names it 2,000 times: core rejects the call, and logs that its own answer is too large."""


async def send_large_metadata(address: str) -> None:
    async with peer(address) as stranger:
        stranger.send(HEADERS, END_HEADERS, 1, FIRST)
        for stream in range(3, 2 * CALLS, 2):
            stranger.send(HEADERS, END_HEADERS, stream, LARGE)
        resets = 0
        async for kind, _, _, _ in stranger.frames():
            resets += kind == RST_STREAM
            if resets == ENDED:
                return
        raise ConnectionError("the server closed the connection")


async def test_lines_of_grpc_are_structured_and_limited() -> None:
    with start("--log-format", "json", auto=True) as process:
        serving = process.until("serving")
        async with asyncio.timeout(60):
            for _ in range(2):
                await send_large_metadata(serving["address"])
        process.send(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait) == 0
        entries = [json.loads(line) for line in process.rest()]  # Each line is ours.
    native = [entry for entry in entries if entry["event"] == "native code logs"]
    assert 1 <= len(native) <= MOST_LINES < 2 * ENDED
    assert ".cc:" in native[0]["line"]
