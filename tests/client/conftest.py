"""Both clients behind one blocking face, so that every test is written once for both."""

import asyncio
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from darkroom_client import AsyncClient, Client
from tests.client.scripted import ScriptedServer

Connect = Callable[..., Any]


class Blocking:
    """An ``AsyncClient`` in an event loop of its own, with the face of a ``Client``."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(*args, **options)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._client, name)
        if not inspect.iscoroutinefunction(value):
            return value
        return lambda *args, **options: self._runner.run(value(*args, **options))

    def shut(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the developer's own reaches a test."""
    for name in [name for name in os.environ if name.startswith("DARKROOM_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """A server that does what its ``script`` says."""
    with ScriptedServer() as server:
        yield server


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Makes clients of one kind, and closes them in the end."""
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
