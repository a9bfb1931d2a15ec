"""A real server in its own process, behind a proxy that breaks connections, with many callers."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from darkroom_client import (
    Accepted,
    AsyncClient,
    Client,
    DarkroomError,
    GenerationRequest,
    GenerationResult,
    Progress,
)

CALLERS = 32

SERVER = """
import sys
from darkroom_server import app, cli
from darkroom_server.backends.fake import FakeEngine

def started(job):
    print(job.seed, flush=True)

app.build_engines = lambda _: [FakeEngine(pass_seconds=float(sys.argv[1]), on_submit=started)]
cli.main(["serve", "--metrics-port", "0", *sys.argv[2:]])
"""


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


class RealServer:
    """`darkroom-server serve` with the fake engine; ``started`` counts the jobs of each seed."""

    def __init__(self, *flags: str, pass_seconds: float = 0.01) -> None:
        self.port = free_port()
        self.target = f"127.0.0.1:{self.port}"
        self.started: Counter[int] = Counter()
        self._flags = [str(pass_seconds), "--port", str(self.port), *flags]
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, *self._flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, args=(self._process,))
        self._reader.start()

    def stop(self, number: signal.Signals) -> None:
        assert self._process
        assert self._reader
        self._process.send_signal(number)
        self._process.wait(60)
        self._reader.join()
        assert self._process.stdout
        self._process.stdout.close()

    def __enter__(self) -> Self:
        self.start()
        with Client(self.target) as client:
            client.wait_until_ready(120)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop(signal.SIGKILL)

    def _read(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout
        for line in process.stdout:
            self.started[json.loads(line)] += 1


class BreakableProxy:
    """A proxy to a port that breaks all its connections on demand."""

    def __init__(self, port: int) -> None:
        self.port = 0
        self._beyond = port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._ways: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    def cut(self) -> None:
        """Reset every connection."""
        asyncio.run_coroutine_threadsafe(self._cut(), self._loop).result()

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _open(self) -> None:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        assert self._server
        self._server.close()
        await self._cut()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)

    async def _cut(self) -> None:
        for way in self._ways:
            way.transport.abort()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._beyond)
        except OSError:
            writer.transport.abort()
            return
        self._ways |= {writer, back}
        await asyncio.gather(self._pump(reader, back), self._pump(there, writer))
        self._ways -= {writer, back}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        writer.transport.abort()


@dataclass(frozen=True)
class Call:
    """One call and its outcome."""

    seed: int
    kind: str
    accepted: bool
    outcome: GenerationResult | DarkroomError | None
    seconds: float

    @property
    def generated(self) -> bool:
        return isinstance(self.outcome, GenerationResult)


def wanted(seed: int) -> GenerationRequest:
    return GenerationRequest(prompt="a star", seed=seed, steps=4 + seed % 8)


def kind_of(seed: int) -> str:
    """Of eight calls, four are streams, three are unary, and one is closed early."""
    return ("stream", "generate")[seed % 2] if seed % 8 else "leave"


def call_blocking(client: Client, seed: int) -> Call:
    began, kind, accepted = time.monotonic(), kind_of(seed), False
    outcome: GenerationResult | DarkroomError | None = None
    try:
        if kind == "generate":
            outcome = client.generate(wanted(seed))
        else:
            with client.stream(wanted(seed)) as stream:
                for event in stream:
                    accepted = accepted or isinstance(event, Accepted)
                    if kind == "leave" and isinstance(event, Progress):
                        break
                else:
                    outcome = stream.result()
    except DarkroomError as error:
        outcome = error
    return Call(seed, kind, accepted, outcome, time.monotonic() - began)


async def call_async(client: AsyncClient, seed: int) -> Call:
    began, kind, accepted = time.monotonic(), kind_of(seed), False
    outcome: GenerationResult | DarkroomError | None = None
    try:
        if kind == "generate":
            outcome = await client.generate(wanted(seed))
        else:
            async with client.stream(wanted(seed)) as stream:
                async for event in stream:
                    accepted = accepted or isinstance(event, Accepted)
                    if kind == "leave" and isinstance(event, Progress):
                        break
                else:
                    outcome = await stream.result()
    except DarkroomError as error:
        outcome = error
    return Call(seed, kind, accepted, outcome, time.monotonic() - began)


def storm(style: str, target: str, each: int, timeout: float) -> list[Call]:
    """Run ``CALLERS`` callers at once, each with ``each`` calls in a row."""
    if style == "async":
        return asyncio.run(_storm_async(target, each, timeout))

    def work(client: Client, caller: int) -> list[Call]:
        return [call_blocking(client, caller * each + index) for index in range(each)]

    with Client(target, timeout=timeout) as client, ThreadPoolExecutor(CALLERS) as pool:
        rows = pool.map(lambda caller: work(client, caller), range(CALLERS))
        return [call for row in rows for call in row]


async def _storm_async(target: str, each: int, timeout: float) -> list[Call]:
    async def work(client: AsyncClient, caller: int) -> list[Call]:
        return [await call_async(client, caller * each + index) for index in range(each)]

    async with AsyncClient(target, timeout=timeout) as client:
        rows = await asyncio.gather(*(work(client, caller) for caller in range(CALLERS)))
    return [call for row in rows for call in row]


class Disruption:
    """Repeats a disruption in its own thread, ``most`` times or until the block ends."""

    def __init__(self, make: Callable[[], None], *, pause: float, most: int) -> None:
        self.times = 0
        self._most = most
        self._make = make
        self._pause = pause
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while self.times < self._most and not self._over.wait(self._pause):
            self._make()
            self.times += 1
