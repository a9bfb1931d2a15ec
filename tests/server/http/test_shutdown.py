"""A drain finishes the jobs of both doors, and then closes both ports."""

import asyncio

import httpx2
import pytest

from darkroom_server.settings import Shutdown
from tests.server.http.door import door, events_of


async def test_a_drain_finishes_both_doors() -> None:
    async with door(shutdown=Shutdown(grace=30)) as there:
        whole = there.generating()
        body = {"prompt": "a star", "stream": True}
        stream = asyncio.create_task(there.client.post("/v1/images/generations", json=body))
        over_grpc = there.wire.generating()
        for _ in range(3):
            await there.wire.submitted.get()
        there.wire.server.stop()
        await there.wire.serve
        ending = asyncio.create_task(there.wire.server.shutdown())
        await there.wire.becomes(lambda: not there.wire.server.dispatcher.ready)
        assert (await there.client.get("/ready")).status_code == 503
        late = await there.generate()
        assert late.status_code == 503
        assert late.json()["error"]["code"] == "draining"
        assert "retry-after" in late.headers
        there.wire.engine.advance(4)
        assert (await whole).status_code == 200
        assert events_of((await stream).text)[-1][0] == "image_generation.completed"
        assert (await over_grpc).images
        await ending
        with pytest.raises(httpx2.ConnectError):
            await there.client.get("/health")


async def test_jobs_that_do_not_finish_in_time_get_an_answer() -> None:
    async with door(shutdown=Shutdown(grace=0.05)) as there:
        whole = there.generating()
        await there.wire.submitted.get()
        there.wire.server.stop()
        await there.wire.serve
        await there.wire.server.shutdown()
        reply = await whole
        assert reply.status_code == 503
        assert reply.json()["error"]["code"] == "draining"


async def test_connections_that_idle_do_not_delay_the_end() -> None:
    async with door() as there:
        assert (await there.client.get("/health")).status_code == 200
        host, _, port = there.wire.server.http_address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /health HTTP/1.1\r\n")
        await writer.drain()
        there.wire.server.stop()
        await there.wire.serve
        async with asyncio.timeout(10):
            await there.wire.server.shutdown()
        assert await reader.read() == b""
        writer.close()
