"""Restart two servers behind one name in turn, under load: no caller sees a failure."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from darkroom_client import AsyncClient
from tests.server.app.process import CLEAN, MAIN

CALLERS = 12
PASS_SECONDS = 0.02
STEPS_OF_LONG_JOBS = 75
"""A second and a half: longer than a draining server keeps its port open."""

SERVER = "from darkroom_server import app; app.REJECT_SECONDS = 1.0\n" + MAIN


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


async def start(port: int) -> "subprocess.Popen[bytes]":
    """A ready server; its output is discarded, so no pipe can fill up."""
    engine = json.dumps({"pass_seconds": PASS_SECONDS})
    flags = ["--port", str(port), "--log-level", "error"]
    process = subprocess.Popen([sys.executable, "-c", SERVER, engine, *flags], env=CLEAN)
    async with AsyncClient(f"127.0.0.1:{port}") as client:
        await client.wait_until_ready(60)
    return process


async def restart(process: "subprocess.Popen[bytes]", port: int) -> "subprocess.Popen[bytes]":
    process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(process.wait, 60) == 0
    return await start(port)


@dataclass
class Load:
    """Callers that request one image after another until they are stopped."""

    client: AsyncClient
    generated: int = 0
    stopped: bool = False

    async def caller(self, number: int) -> None:
        steps = STEPS_OF_LONG_JOBS if number < 2 else 4
        while not self.stopped:
            if number % 3:
                result = await self.client.generate("a star", steps=steps)
            else:
                async with self.client.stream("a star", steps=steps) as stream:
                    result = await stream.result()
            assert result.images[0].data
            self.generated += 1

    async def more(self) -> None:
        """Wait long enough for every caller to be served once more."""
        enough = self.generated + 2 * CALLERS
        while self.generated < enough:
            await asyncio.sleep(PASS_SECONDS)


@asynccontextmanager
async def load(target: str) -> AsyncIterator[Load]:
    async with AsyncClient(target) as client:
        running = Load(client)
        async with asyncio.TaskGroup() as group:
            for number in range(CALLERS):
                group.create_task(running.caller(number))
            yield running
            running.stopped = True


async def test_no_caller_sees_a_failure() -> None:
    ports = [free_port() for _ in range(2)]
    servers = [*await asyncio.gather(*map(start, ports))]
    try:
        async with load("ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)) as running:
            await running.more()
            for index, port in enumerate(ports):
                servers[index] = await restart(servers[index], port)
                await running.more()
    finally:
        for server in servers:
            server.kill()
            server.wait()
