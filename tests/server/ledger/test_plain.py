"""Plain jobs in the PostgreSQL ledger: they are counted, they wait, they end with their calls."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from darkroom_server.core.errors import QuotaExceeded, Reason
from darkroom_server.core.ledger import Entry, Key, Standing
from darkroom_server.ledger.postgres import PostgresLedger
from tests.server.ledger.conftest import draft
from tests.server.ledger.test_postgres import DEMO, JOB, Fleet
from tools.postgres import Cluster, emptied

pytestmark = pytest.mark.needs("postgresql")


@pytest.fixture
async def pair(postgresql: Cluster) -> AsyncIterator[tuple[PostgresLedger, PostgresLedger]]:
    """Two servers; the calls are at the first one."""
    await emptied(postgresql.url)
    async with AsyncExitStack() as stack:
        fleet = Fleet(postgresql.url, stack)
        yield await fleet.join("calls"), await fleet.join("other")


async def found(ledger: PostgresLedger, id: str = "job") -> Entry:
    entry = await ledger.find(Key("ada", id))
    assert entry is not None
    return entry


async def dies(server: PostgresLedger, other: PostgresLedger) -> None:
    """Its connection ends with its process, and ``other`` notices."""
    server._session.drop()
    while server.id in (await other.beat()).servers:
        pass


async def test_a_plain_job_that_ends_where_its_calls_are_leaves_nothing(
    pair: tuple[PostgresLedger, PostgresLedger],
) -> None:
    calls, other = pair
    quota: dict[str, Any] = {"plain": True, "max_live": 1}
    begun = await calls.begin(draft(**quota), claimed=True)
    assert (begun.entry.owner, begun.entry.calls_at) == (calls.id, calls.id)
    with pytest.raises(QuotaExceeded):
        await other.begin(draft("second", **quota), claimed=True)
    assert not await other.drop(begun.entry.hold)
    assert await calls.drop(begun.entry.hold)
    assert await calls.find(JOB) is None
    assert not await calls.drop(begun.entry.hold)
    assert (await other.begin(draft("second", **quota), claimed=True)).new


async def test_only_a_plain_job_is_dropped(pair: tuple[PostgresLedger, PostgresLedger]) -> None:
    calls, other = pair
    kept = await calls.begin(draft(), claimed=True)
    assert kept.entry.calls_at is None
    assert not await calls.drop(kept.entry.hold)
    await calls.begin(draft("waits", plain=True), claimed=False)
    (claimed,) = await other.claim(5, models=DEMO)
    # The server that has the call fetches the result first.
    assert (claimed.calls_at, claimed.owner) == (calls.id, other.id)
    assert not await other.drop(claimed.hold)
    assert await other.end(claimed.hold, Standing.FINISHED)


@pytest.mark.parametrize("claimed", [False, True])
async def test_a_plain_job_ends_with_the_server_that_has_its_calls(
    pair: tuple[PostgresLedger, PostgresLedger], claimed: bool
) -> None:
    calls, other = pair
    await calls.begin(draft(plain=True, inputs={"x": b"1"}), claimed=claimed)
    await calls.begin(draft("kept", inputs={"y": b"1"}), claimed=claimed)
    await other.beat()
    assert (await found(other)).standing is (Standing.CLAIMED if claimed else Standing.QUEUED)
    await dies(calls, other)
    entry = await found(other)
    assert entry.failure is not None
    assert (entry.standing, entry.failure.reason) == (Standing.CANCELLED, Reason.DRAINING)
    assert await other.inputs(JOB) == {}
    kept = await found(other, "kept")
    assert kept.standing is Standing.QUEUED
    assert await other.inputs(kept.key) == {"y": b"1"}


async def test_what_another_server_runs_is_for_that_one_to_cancel(
    pair: tuple[PostgresLedger, PostgresLedger],
) -> None:
    calls, other = pair
    await calls.begin(draft(plain=True), claimed=False)
    (claimed,) = await other.claim(1, models=DEMO)
    await dies(calls, other)
    assert (await found(other)).hold == claimed.hold
    assert await other.end(claimed.hold, Standing.CANCELLED)


async def test_a_plain_job_goes_on_elsewhere_if_the_server_that_runs_it_dies(
    pair: tuple[PostgresLedger, PostgresLedger],
) -> None:
    calls, other = pair
    await calls.begin(draft(plain=True), claimed=False)
    await other.claim(1, models=DEMO)
    await dies(other, calls)
    entry = await found(calls)
    assert (entry.standing, entry.losses, entry.calls_at) == (Standing.QUEUED, 1, calls.id)


async def test_a_second_plain_call_at_the_same_server_changes_nothing(
    pair: tuple[PostgresLedger, PostgresLedger],
) -> None:
    calls, _ = pair
    await calls.begin(draft(plain=True), claimed=True)
    joined = await calls.begin(draft(plain=True), claimed=True)
    assert (joined.new, joined.entry.calls_at) == (False, calls.id)


@pytest.mark.parametrize("plain", [False, True])
async def test_a_call_at_another_server_makes_a_plain_job_outlive_the_first(
    pair: tuple[PostgresLedger, PostgresLedger], plain: bool
) -> None:
    calls, other = pair
    # It runs where its calls are, so its pictures were not stored.
    begun = await calls.begin(draft(plain=True), claimed=True)
    joined = await other.begin(draft(plain=plain, inputs={"x": b"1"}), claimed=True)
    assert (joined.new, joined.entry.calls_at) == (False, None)
    (extended,) = (await calls.beat()).extended
    assert extended.calls_at is None
    assert not await calls.drop(begun.entry.hold)
    await dies(calls, other)
    assert (await found(other)).standing is Standing.QUEUED
    assert await other.inputs(JOB) == {"x": b"1"}
