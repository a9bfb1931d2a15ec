"""One warm ``Client.generate`` on an idle server with the fake engine, traced on both sides."""

import asyncio
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

import darkroom_client
import darkroom_server
from darkroom_client import Client
from darkroom_server.app import Server
from darkroom_server.backends.fake import FakeEngine
from darkroom_server.settings import Network, Settings
from tools.trace_request.tracer import Tracer, Way

STEPS = 4

SETTLE_SECONDS = 0.2
"""Time for what the server does after its answer: it writes the request's summary, for one."""


def trace_generate() -> dict[str, Way]:
    """Trace one request of ``STEPS`` steps; the keys are ``server`` and ``client``."""
    # Nothing of a good request is logged above this level, so no processor of ours runs.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    tracer = Tracer(
        {
            "server": Path(darkroom_server.__file__).parent,
            "client": Path(darkroom_client.__file__).parent,
        }
    )
    with (
        tracer,
        _loop() as loop,
        _serving(loop) as address,
        Client(address, insecure=True) as client,
    ):
        # The first request connects, asks for the server's health, and fills every cache.
        client.generate("a star", steps=STEPS, width=64, height=64)
        _wait(loop, SETTLE_SECONDS)
        with tracer.recording():
            client.generate("a star", steps=STEPS, width=64, height=64)
            _wait(loop, SETTLE_SECONDS)
    return tracer.ways


@contextmanager
def _loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that runs in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="server")
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def _serving(loop: asyncio.AbstractEventLoop) -> Iterator[str]:
    """A ready server on ``loop``, without memory reports and metrics scrapes; its address."""

    async def start() -> tuple[Server, "asyncio.Task[None]"]:
        server = Server(Settings(network=Network(port=0, metrics_port=0)), [FakeEngine(auto=True)])
        await server.startup()
        await server.dispatcher.loaded()
        return server, asyncio.create_task(server.serve())

    async def stop() -> None:
        server.stop()
        await serving
        await server.shutdown()

    server, serving = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield server.address
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result()


def _wait(loop: asyncio.AbstractEventLoop, seconds: float) -> None:
    asyncio.run_coroutine_threadsafe(asyncio.sleep(seconds), loop).result()
