"""Every ledger, behind one fixture."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from darkroom_server.core.ledger import Draft, Key, Ledger
from darkroom_server.ledger.memory import MemoryLedger
from darkroom_server.ledger.postgres import PostgresLedger
from darkroom_server.ledger.sqlite import SqliteLedger
from tests.server.clock import Clock
from tools.postgres import emptied

MakeLedger = Callable[..., Any]


@pytest.fixture(
    params=["memory", "sqlite", pytest.param("postgres", marks=pytest.mark.needs("postgresql"))]
)
async def make(
    request: pytest.FixtureRequest, tmp_path: Path, clock: Clock
) -> AsyncIterator[MakeLedger]:
    """Makes an open ledger; all follow ``clock``, and keep what ended for 300 seconds."""
    async with AsyncExitStack() as closing:

        async def make(**options: Any) -> Ledger:
            options = {"name": "here", "retention": 300.0, **options}
            ledger: Ledger
            if request.param == "memory":
                ledger = MemoryLedger(**options)
            elif request.param == "postgres":
                url = request.getfixturevalue("postgresql").url
                await emptied(url)
                ledger = PostgresLedger(url, now=monotonic, **options)
            else:
                ledger = SqliteLedger(tmp_path / "jobs.db", clock=time.monotonic, **options)
            await ledger.open()
            closing.push_async_callback(ledger.close)
            return ledger

        yield make


def monotonic() -> str:
    """``clock``'s time as SQL."""
    return f"{time.monotonic()!r}::float8"


@pytest.fixture
async def ledger(make: MakeLedger) -> Ledger:
    opened: Ledger = await make()
    return opened


def draft(id: str = "job", caller: str = "ada", **changes: Any) -> Draft:
    deadline = changes.get("deadline")
    fields: dict[str, Any] = {
        "key": Key(caller, id),
        "fingerprint": b"same",
        "record": b"record of " + id.encode(),
        "model": "demo",
        "counted_as": caller,
        "goal": 1.0 if deadline is None else min(1.0, deadline),
        **changes,
    }
    return Draft(**fields)
