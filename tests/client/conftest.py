"""Both clients behind one blocking interface: each test runs with both."""

import asyncio
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, Self

import pytest

from darkroom_client import AsyncClient, Client, Retry
from darkroom_client.testing import FakeServer
from darkroom_client.testing.plugin import darkroom_server
from tests.client.scripted import ScriptedServer

__all__ = ["darkroom_server"]

Connect = Callable[..., Any]


class Blocking:
    """An ``AsyncClient`` in its own event loop and thread, with the interface of a ``Client``."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._client = AsyncClient(*args, **options)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._client, name)
        if inspect.iscoroutinefunction(value):
            return lambda *args, **options: self._run(value(*args, **options))
        if not callable(value):
            return value
        return lambda *args, **options: BlockingStream(self._run, value, args, options)

    def shut(self) -> None:
        self._run(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, awaitable: Any) -> Any:
        async def wait() -> Any:
            return await awaitable

        return asyncio.run_coroutine_threadsafe(wait(), self._loop).result()


class BlockingStream:
    """An ``AsyncStream``, or any other asynchronous iterator, with a blocking interface."""

    def __init__(self, run: Any, make: Any, args: Any, options: Any) -> None:
        async def made() -> Any:
            return make(*args, **options)

        self._run = run
        self._stream = run(made())

    def __enter__(self) -> Self:
        self._run(self._stream.__aenter__())
        return self

    def __exit__(self, *error: Any) -> None:
        self._run(self._stream.__aexit__(*error))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        try:
            return self._run(self._stream.__anext__())
        except StopAsyncIteration:
            raise StopIteration from None

    @property
    def request_id(self) -> str:
        request_id: str = self._stream.request_id
        return request_id

    def result(self) -> Any:
        return self._run(self._stream.result())

    def close(self) -> None:
        """Close the stream or the asynchronous generator."""
        close = getattr(self._stream, "aclose", None) or self._stream.close
        self._run(close())


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the developer's own settings from the tests."""
    for name in [name for name in os.environ if name.startswith("DARKROOM_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """A server that follows its ``script``."""
    with ScriptedServer() as server:
        yield server


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Creates clients of one kind, and closes them at the end."""
    clients: list[Any] = []

    def connect(*args: Any, **options: Any) -> Any:
        clients.append((Client if request.param == "sync" else Blocking)(*args, **options))
        return clients[-1]

    yield connect
    for client in clients:
        client.shut() if isinstance(client, Blocking) else client.close()


@pytest.fixture
def client(connect: Connect, server: ScriptedServer) -> Any:
    """A client of ``server``."""
    return connect(server.address)


@pytest.fixture
def fake(darkroom_server: FakeServer) -> FakeServer:
    """A fake server with streams and jobs."""
    return darkroom_server


@pytest.fixture
def caller(connect: Connect, fake: FakeServer) -> Any:
    """A client of ``fake`` that retries at once."""
    return connect(fake.target, retry=Retry(initial_backoff=0.01, max_backoff=0.05))
