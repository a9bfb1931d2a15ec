"""Health watchers that read nothing: by hand-written frames, with a flow control window of 0."""

import asyncio
import time

from darkroom_server.settings import Shutdown
from tests.server.hostile.http2 import peer
from tests.server.hostile.leaks import nothing_leaks
from tests.server.wire import NOT_SERVING, SERVING, serving

WATCH = "grpc.health.v1.Health/Watch"


async def test_watchers_that_read_nothing_delay_no_health_and_no_shutdown() -> None:
    async with serving(fake={"auto": True}, shutdown=Shutdown(grace=5)) as wire:
        async with nothing_leaks(), peer(wire.server.address, window=0) as stranger:
            for _ in range(50):
                stranger.open(WATCH)
            await stranger.writer.drain()
            await asyncio.sleep(0.2)  # The server's writes to them are blocked now.
            async with asyncio.timeout(10):
                wire.engine.die()
                await wire.health_becomes(NOT_SERVING)  # Another watcher sees each change.
                assert await wire.health() == NOT_SERVING
                await wire.health_becomes(SERVING)
            began = time.monotonic()
            assert await wire.health("liveness") == SERVING
            assert time.monotonic() - began < 1.0
        async with peer(wire.server.address, window=0) as stranger:
            stranger.open(WATCH)
            stranger.open(WATCH)
            await asyncio.sleep(0.1)
            async with asyncio.timeout(20):
                wire.server.stop()
                await wire.serve
                await wire.server.shutdown()
        assert wire.server.unfinished == []
