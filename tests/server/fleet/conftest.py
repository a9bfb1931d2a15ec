"""Several servers in this process, on one ledger in PostgreSQL."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import asyncpg
import pytest

from darkroom_server.core.ledger import Begun, Draft, Key
from darkroom_server.dispatch import ActiveJob
from darkroom_server.settings import Network, Shutdown
from darkroom_server.settings.tree import Storage
from tests.server.wire import Wire, serving
from tools.postgres import Cluster, emptied

POLL_SECONDS = 0.005


class Servers:
    """Servers that share the ledger at ``url``."""

    def __init__(self, url: str, stack: AsyncExitStack) -> None:
        self.url = url
        self._stack = stack
        self._connection: asyncpg.Connection | None = None

    async def start(self, name: str, *, storage: Storage | None = None, **sections: Any) -> Wire:
        """One more; it gives its jobs no time to finish when it stops."""
        sections = {"shutdown": Shutdown(grace=0.0), **sections}
        network = Network(port=0, metrics_port=0, server_id=name)
        wire = await self._stack.enter_async_context(
            serving(network=network, storage=storage or Storage(ledger=self.url), **sections)
        )
        # Until then the others ask callers to try again.
        await self.finds(1, "SELECT 1 FROM servers WHERE name = $1 AND address <> ''", name)
        return wire

    async def sql(self, statement: str, *values: Any) -> list[Any]:
        """The rows that a statement finds, on one connection; again after the database was away."""
        if self._connection is None or self._connection.is_closed():
            settings = {"search_path": "darkroom"}
            self._connection = await asyncpg.connect(self.url, server_settings=settings)
            self._stack.push_async_callback(self._connection.close)
        rows: list[Any] = await self._connection.fetch(statement, *values)
        return rows

    async def finds(self, count: int, statement: str, *values: Any) -> None:
        """Wait until a statement finds ``count`` rows."""
        while len(await self.sql(statement, *values)) != count:
            await asyncio.sleep(POLL_SECONDS)

    async def states(self) -> dict[str, int]:
        """The state of each job in the ledger."""
        rows = await self.sql("SELECT request_id, state FROM jobs ORDER BY request_id")
        return {row["request_id"]: row["state"] for row in rows}

    async def becomes(self, condition: Callable[[dict[str, int]], bool]) -> None:
        """Wait until ``condition`` of the ``states`` holds."""
        while not condition(await self.states()):
            await asyncio.sleep(POLL_SECONDS)


class HeldAnswers:
    """Holds what the ledger answers to the begins of ``wire``, until ``release`` is set.

    ``asked``: how many calls wait to know whether a job is there.
    """

    def __init__(self, wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
        self.committed = asyncio.Event()
        self.release = asyncio.Event()
        self.asked = 0
        ledger, results = wire.server._entries._ledger, wire.server.results
        begin, agreed = ledger.begin, results.agreed

        async def held(draft: Draft, *, claimed: bool) -> Begun:
            begun = await begin(draft, claimed=claimed)
            self.committed.set()
            await self.release.wait()
            return begun

        async def counted(key: Key) -> ActiveJob | None:
            self.asked += 1
            return await agreed(key)

        monkeypatch.setattr(ledger, "begin", held)
        monkeypatch.setattr(results, "agreed", counted)


@pytest.fixture
async def servers(postgresql: Cluster) -> AsyncIterator[Servers]:
    await emptied(postgresql.url)
    async with AsyncExitStack() as stack:
        yield Servers(postgresql.url, stack)
