"""The PostgreSQL ledger: several servers at once, dead ones, and a database that goes away."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from darkroom_server.core.errors import (
    LedgerUnreachable,
    QuotaExceeded,
    Reason,
    StartupError,
)
from darkroom_server.core.ledger import Announcement, Key, Models, SharedLedger, Standing
from darkroom_server.ledger.postgres import PostgresLedger, migrate
from darkroom_server.ledger.postgres.connections import check_url, database_name
from darkroom_server.ledger.postgres.schema import MIGRATIONS
from tests.server.ledger.conftest import draft
from tools.postgres import Cluster, cluster, emptied

pytestmark = pytest.mark.needs("postgresql")

JOB = Key("ada", "job")

DEMO = Models(held={"demo": "fast"})

DATA = Path(__file__).with_name("data")

SCHEMAS = [DATA / f"postgres_schema_{number}.sql" for number in range(1, len(MIGRATIONS))]
"""By ``pg_dump --schema=darkroom --inserts`` of servers of these schemas that were killed."""


class Fleet:
    """Ledgers of several servers on one database, which need not settle after its start."""

    def __init__(self, url: str, stack: AsyncExitStack) -> None:
        self.url = url
        self._stack = stack

    async def join(self, name: str, models: Models = DEMO, **options: Any) -> PostgresLedger:
        ledger = PostgresLedger(self.url, name=name, retention=300.0, settle=0.0, **options)
        ledger.announce(Announcement(address=f"{name}:1", key=f"key of {name}", models=models))
        await ledger.open()
        self._stack.push_async_callback(ledger.close)
        return ledger

    async def sql_script(self, script: str) -> None:
        """Replace the ledger by what several statements make."""
        await emptied(self.url)
        connection = await asyncpg.connect(self.url)
        await connection.execute(script)
        await connection.close()

    async def sql(self, statement: str, *values: Any) -> Any:
        connection = await asyncpg.connect(self.url, server_settings={"search_path": "darkroom"})
        try:
            return await connection.fetch(statement, *values)
        finally:
            await connection.close()


@pytest.fixture
async def fleet(postgresql: Cluster) -> AsyncIterator[Fleet]:
    await emptied(postgresql.url)
    async with AsyncExitStack() as stack:
        yield Fleet(postgresql.url, stack)


async def test_it_is_a_shared_ledger(fleet: Fleet) -> None:
    a, b = await fleet.join("a"), await fleet.join("b")
    assert isinstance(a, SharedLedger)
    await a.beat()
    assert [(each.name, each.address, each.key) for each in await b.servers()] == [
        ("a", "a:1", "key of a"),
        ("b", "b:1", "key of b"),
    ]
    await a.close()
    assert [each.name for each in await b.servers()] == ["b"]


async def test_each_queued_job_is_claimed_by_one_server(fleet: Fleet) -> None:
    servers = [await fleet.join(name) for name in "abc"]
    for number in range(30):
        await servers[0].begin(draft(f"{number:02}", goal=30.0 - number), claimed=False)
    rounds = await asyncio.gather(*(server.claim(4) for server in servers for _ in range(3)))
    keys = [entry.key.request_id for claimed in rounds for entry in claimed]
    assert len(keys) == len(set(keys))
    assert 20 < len(keys) <= 30
    assert {each.owner for claimed in rounds for each in claimed} == {s.id for s in servers}
    # The nearest goals went first: what is left are the latest ones.
    left = {f"{n:02}" for n in range(30)} - set(keys)
    assert left <= {f"{n:02}" for n in range(10)}


async def test_ids_and_quotas_hold_for_all_servers(fleet: Fleet) -> None:
    servers = [await fleet.join(name) for name in "abc"]
    same = await asyncio.gather(*(server.begin(draft(), claimed=True) for server in servers))
    assert [begun.new for begun in same].count(True) == 1
    assert len({(begun.entry.owner, begun.entry.epoch) for begun in same}) == 1
    begins = [
        servers[n % 3].begin(draft(f"many{n}", "bob", max_live=7), claimed=bool(n % 2))
        for n in range(50)
    ]
    done = await asyncio.gather(*begins, return_exceptions=True)
    assert sum(isinstance(each, QuotaExceeded) for each in done) == 43
    assert [each for each in done if isinstance(each, BaseException)] == [
        each for each in done if isinstance(each, QuotaExceeded)
    ]


async def test_the_jobs_of_a_dead_server_are_queued_and_its_end_changes_nothing(
    fleet: Fleet,
) -> None:
    dead, alive = await fleet.join("dead"), await fleet.join("alive")
    begun = await dead.begin(draft(), claimed=True)
    assert (await alive.beat()).reclaimed == 0
    dead._session.drop()  # Its connection ends with its process.
    while not (await alive.beat()).reclaimed:
        pass  # The database notices the end of a connection within milliseconds.
    entry = await alive.find(JOB)
    assert entry is not None
    assert (entry.standing, entry.losses, entry.owner) == (Standing.QUEUED, 1, None)
    (claimed,) = await alive.claim(1)
    assert claimed.epoch > begun.entry.epoch
    assert not await dead.end(begun.entry.hold, Standing.FINISHED)
    assert await dead.release([begun.entry.hold]) == 0
    assert await alive.end(claimed.hold, Standing.FINISHED)


async def test_a_frozen_server_loses_its_lease_and_comes_back_as_another_one(fleet: Fleet) -> None:
    frozen, alive = await fleet.join("frozen"), await fleet.join("alive")
    before = frozen.id
    begun = await frozen.begin(draft(), claimed=True)
    await alive.beat()
    assert (await alive.find(JOB)).owner == before  # type: ignore[union-attr]
    # It holds its lock, but does not renew.
    await fleet.sql("UPDATE servers SET renewed_at = 0 WHERE id = $1", before)
    pulse = await alive.beat()
    assert (pulse.reclaimed, pulse.queued, pulse.servers) == (1, 1, frozenset({alive.id}))
    pulse = await frozen.beat()
    assert pulse.returned
    assert frozen.id != before
    assert not await frozen.end(begun.entry.hold, Standing.FINISHED)
    assert not (await frozen.beat()).returned


async def test_a_server_without_a_connection_comes_back_as_itself(fleet: Fleet) -> None:
    a = await fleet.join("a")
    before = a.id
    begun = await a.begin(draft(), claimed=True)
    await fleet.sql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = "
        "'darkroom a'"
    )
    returned = False
    while not returned:
        with suppress(LedgerUnreachable):
            returned = (await a.beat()).returned
    assert a.id == before
    assert [entry.hold for entry in await a.mine()] == [begun.entry.hold]


async def test_a_lock_number_that_is_taken_is_not_waited_for(fleet: Fleet) -> None:
    """After the schema was made again, its numbers begin again."""
    a = await fleet.join("a")
    await fleet.sql("ALTER SEQUENCE session_locks RESTART")
    async with asyncio.timeout(10):
        b = await fleet.join("b")
    assert {each.id for each in await b.servers()} == {a.id, b.id}


async def test_an_entry_of_a_server_that_is_gone_can_run_again(fleet: Fleet) -> None:
    a, b = await fleet.join("a"), await fleet.join("b")
    begun = await a.begin(draft(), claimed=True)
    await a.end(begun.entry.hold, Standing.FINISHED)
    assert await b.again(JOB, "") is None  # Its result is at the other server.
    await a.close()
    claimed = await b.again(JOB, "")
    assert claimed is not None
    assert (claimed.owner, claimed.standing) == (b.id, Standing.CLAIMED)


async def test_an_exact_job_that_began_waits_for_its_own_runtime(fleet: Fleet) -> None:
    fast, slow = DEMO, Models(held={"demo": "slow"})
    first, other = await fleet.join("first"), await fleet.join("other", slow)
    await first.begin(draft("exact", runtime="fast"), claimed=True)
    await first.begin(draft("usual"), claimed=True)
    await first.close()
    while not (pulse := await other.beat()).reclaimed:
        pass
    assert pulse.queued == 2
    assert [e.key.request_id for e in await other.claim(5, models=slow)] == ["usual"]
    # Nobody has its runtime, so it ends.
    await fleet.sql("UPDATE jobs SET queued_at = queued_at - 30")
    await other.beat()
    assert (await fleet.sql("SELECT state FROM jobs WHERE request_id = 'exact'"))[0][0] == 0
    own = await fleet.join("own")
    await fleet.sql("UPDATE jobs SET queued_at = queued_at - 2")
    await other.beat()
    (claimed,) = await own.claim(5, models=fast)
    assert (claimed.key.request_id, claimed.runtime) == ("exact", "fast")
    assert await own.release([claimed.hold])
    await own.close()
    await fleet.sql("UPDATE jobs SET queued_at = queued_at - 61")
    await other.beat()
    entry = await other.find(claimed.key)
    assert entry is not None
    assert entry.failure is not None
    assert (entry.standing, entry.failure.reason) == (Standing.FAILED, Reason.MODEL_GONE)


async def test_an_exact_job_whose_images_are_gone_is_queued_for_its_own_runtime(
    fleet: Fleet,
) -> None:
    first, other = await fleet.join("first"), await fleet.join("other")
    begun = await first.begin(draft(runtime="fast"), claimed=True)
    await first.end(begun.entry.hold, Standing.FINISHED)
    await first.close()
    queued = await other.again(JOB, "slow")
    assert queued is not None
    assert (queued.standing, queued.owner) == (Standing.QUEUED, None)
    assert await other.claim(1, models=Models(held={"demo": "slow"})) == []
    (claimed,) = await other.claim(1, models=DEMO)
    assert claimed.epoch > begun.entry.epoch


async def test_a_model_is_loaded_only_if_no_server_that_has_it_comes_first(fleet: Fleet) -> None:
    would_load = Models(loadable={"demo": "fast"})
    holds, loads = await fleet.join("holds"), await fleet.join("loads", would_load)
    await holds.begin(draft("one"), claimed=False)
    await holds.begin(draft("two"), claimed=False)
    assert await loads.claim(1, models=would_load, delay=30.0) == []
    assert len(await loads.claim(1, models=would_load, delay=0.0)) == 1
    await fleet.sql("UPDATE jobs SET queued_at = queued_at - 31")
    assert len(await loads.claim(1, models=would_load, delay=30.0)) == 1
    await holds.begin(draft("three"), claimed=False)
    assert await loads.claim(1, models=would_load, delay=30.0) == []
    await holds.close()
    assert len(await loads.claim(1, models=would_load, delay=30.0)) == 1


async def test_jobs_that_waited_too_long_end(fleet: Fleet) -> None:
    a = await fleet.join("a")
    await a.begin(draft("late", deadline=0.0, inputs={"x": b"1"}), claimed=False)
    await a.begin(draft("early", deadline=60.0), claimed=False)
    await a.begin(draft("unserved", model="other"), claimed=False)
    await fleet.sql("UPDATE jobs SET queued_at = queued_at - 61")
    await a.beat()
    await a.beat()
    standings = {id: await a.find(Key("ada", id)) for id in ("late", "early", "unserved")}
    assert {id: e and e.standing for id, e in standings.items()} == {
        "late": Standing.EXPIRED,
        "early": Standing.QUEUED,
        "unserved": Standing.FAILED,
    }
    unserved = standings["unserved"]
    assert unserved is not None
    assert unserved.failure is not None
    assert unserved.failure.reason is Reason.MODEL_GONE
    assert await fleet.sql("SELECT * FROM inputs") == []


async def test_what_no_server_offers_ends_and_what_is_not_known_waits(fleet: Fleet) -> None:
    offering = [Models(DEMO.held, offers=frozenset({name})) for name in ("day", "night")]
    a, _ = [await fleet.join(name, models) for name, models in zip("ab", offering, strict=True)]
    for id in ("day", "night", "dusk"):
        await a.begin(draft(id, needs=frozenset({id})), claimed=False)
    await fleet.sql("UPDATE jobs SET queued_at = queued_at - 61")
    await a.beat()
    found = {id: await a.find(Key("ada", id)) for id in ("day", "night", "dusk")}
    assert {id: e and e.standing for id, e in found.items()} == {
        "day": Standing.QUEUED,
        "night": Standing.QUEUED,
        "dusk": Standing.FAILED,
    }
    dusk = found["dusk"]
    assert dusk is not None
    assert dusk.failure is not None
    assert dusk.failure.reason is Reason.MODEL_GONE
    assert "adapters" in dusk.failure.message
    # A server of an earlier version does not say what it offers.
    await fleet.sql("UPDATE servers SET offers = NULL WHERE name = 'b'")
    await a.begin(draft("dawn", needs=frozenset({"dawn"})), claimed=False)
    await fleet.sql("UPDATE jobs SET queued_at = queued_at - 61")
    await a.beat()
    dawn = await a.find(Key("ada", "dawn"))
    assert dawn is not None
    assert dawn.standing is Standing.QUEUED


async def test_a_server_that_holds_the_model_without_the_adapter_holds_up_nobody(
    fleet: Fleet,
) -> None:
    would_load = Models(loadable={"demo": "fast"}, offers=frozenset({"night"}))
    holds, loads = await fleet.join("holds"), await fleet.join("loads", would_load)
    await holds.begin(draft(needs=frozenset({"night"})), claimed=False)
    for offers, claims in ((frozenset({"night"}), 0), (frozenset[str](), 1)):
        models = Models({"demo": "fast"}, offers=offers)
        holds.announce(Announcement(address="", key="", models=models))
        await holds.beat()
        assert len(await loads.claim(1, models=would_load, delay=30.0)) == claims


async def test_a_job_that_this_server_cannot_run_again_is_queued_for_another(fleet: Fleet) -> None:
    a, b = await fleet.join("a"), await fleet.join("b")
    begun = await b.begin(draft(), claimed=True)
    assert await b.end(begun.entry.hold, Standing.FINISHED)
    await b.close()
    entry = await a.again(JOB, None)
    assert entry is not None
    assert entry.standing is Standing.QUEUED


async def test_the_others_are_woken_only_when_the_queue_was_empty(fleet: Fleet) -> None:
    a, b = await fleet.join("a"), await fleet.join("b")
    b.news.clear()
    await a.begin(draft("mine"), claimed=True)
    await a.begin(draft("first"), claimed=False)
    async with asyncio.timeout(10):
        await b.news.wait()
    b.news.clear()
    received = asyncio.Event()
    connection = await asyncpg.connect(fleet.url)
    await connection.add_listener("darkroom_queued", lambda *_: received.set())
    await a.begin(draft("second"), claimed=False)
    await connection.execute("SELECT 1")  # What was notified comes with the answer.
    assert not received.is_set()
    assert len(await a.claim(2)) == 2
    await a.begin(draft("third"), claimed=False)
    async with asyncio.timeout(10):
        await received.wait()
    await connection.close()


async def test_the_owner_reads_what_other_servers_extend(fleet: Fleet) -> None:
    a, b = await fleet.join("a"), await fleet.join("b")
    await a.begin(draft(deadline=10.0), claimed=True)
    await a.begin(draft(deadline=20.0), claimed=True)
    assert (await a.beat()).extended == ()  # It knows what it did itself.
    await b.begin(draft(deadline=600.0, detached=True), claimed=True)
    (extended,) = (await a.beat()).extended
    assert extended.remaining == pytest.approx(600.0, abs=5)
    assert extended.detached
    assert (await a.beat()).extended == ()


async def test_a_role_without_ddl_serves_what_another_one_made(
    postgresql: Cluster, fleet: Fleet
) -> None:
    await fleet_role(fleet)
    url = postgresql.database("postgres", "server")
    with pytest.raises(StartupError, match="migrate-ledger"):
        await PostgresLedger(url).open()
    assert "is ready" in await migrate(fleet.url)
    await grant(fleet)
    ledger = PostgresLedger(url, retention=300.0)
    await ledger.open()
    begun = await ledger.begin(draft(inputs={"x": b"1"}), claimed=False)
    (claimed,) = await ledger.claim(1)
    assert await ledger.end(claimed.hold, Standing.FINISHED)
    await ledger.forget([claimed.hold])
    await ledger.beat()
    await ledger.renew()
    assert await ledger.find(begun.entry.key) is None
    await ledger.close()


@pytest.mark.parametrize("number", range(1, len(MIGRATIONS)))
async def test_a_ledger_of_an_earlier_schema_is_migrated(fleet: Fleet, number: int) -> None:
    await fleet.sql_script(SCHEMAS[number - 1].read_text())
    assert [row["version"] for row in await fleet.sql("SELECT version FROM ledger")] == [number]
    ledger = await fleet.join("new")
    assert [row["version"] for row in await fleet.sql("SELECT version FROM ledger")] == [
        len(MIGRATIONS)
    ]
    found = {id: await ledger.find(Key("ada", id)) for id in ("waits", "runs", "done")}
    standings = {id: e and (e.standing, e.losses, e.needs) for id, e in found.items()}
    # Its server is gone, and had begun one of them.
    needs = {"adapter night of demo"} if number > 2 else set[str]()
    assert standings == {
        "waits": (Standing.QUEUED, 0, needs),
        "runs": (Standing.QUEUED, 1, frozenset()),
        "done": (Standing.FINISHED, 0, frozenset()),
    }
    runs = found["runs"]
    assert runs is not None
    assert runs.runtime == (None if number == 1 else "fast")
    assert await ledger.inputs(Key("ada", "waits")) == {"digest": b"a picture"}
    claimed = await ledger.claim(5, models=DEMO)
    assert {entry.key.request_id for entry in claimed} == {"waits", "runs"}
    await ledger.begin(draft("exact", runtime="fast"), claimed=True)
    assert (await ledger.find(Key("ada", "exact"))).runtime == "fast"  # type: ignore[union-attr]


async def test_a_role_without_ddl_does_not_migrate(postgresql: Cluster, fleet: Fleet) -> None:
    await fleet_role(fleet)
    await fleet.sql_script(SCHEMAS[0].read_text())
    await grant(fleet)
    url = postgresql.database("postgres", "server")
    with pytest.raises(StartupError, match=f"is to have schema {len(MIGRATIONS)}.*migrate-ledger"):
        await PostgresLedger(url).open()
    assert [row["version"] for row in await fleet.sql("SELECT version FROM ledger")] == [1]
    assert "is ready" in await migrate(fleet.url)
    ledger = PostgresLedger(url, retention=300.0, settle=0.0)
    await ledger.open()
    assert {entry.key.request_id for entry in await ledger.claim(5)} == {"waits", "runs"}
    await ledger.close()


async def test_a_server_goes_on_while_a_newer_one_migrates(fleet: Fleet) -> None:
    ledger = await fleet.join("a")
    with_inputs: dict[str, Any] = {"inputs": {"x": b"1"}}
    for number in range(3):  # Its statements are prepared by now.
        await ledger.begin(draft(f"before{number}", **with_inputs), claimed=True)
        await ledger.begin(draft(f"before{number}", **with_inputs), claimed=True)
    await fleet.sql("ALTER TABLE jobs ADD COLUMN mood text")
    assert not (await ledger.begin(draft("before0", **with_inputs), claimed=True)).new
    assert (await ledger.begin(draft("after", **with_inputs), claimed=False)).new
    assert [entry.key.request_id for entry in await ledger.claim(5)] == ["after"]
    assert len(await ledger.mine()) == 4


async def fleet_role(fleet: Fleet) -> None:
    await fleet.sql("DROP SCHEMA IF EXISTS darkroom CASCADE")
    await fleet.sql("DROP ROLE IF EXISTS server")
    await fleet.sql("CREATE ROLE server LOGIN")


async def grant(fleet: Fleet) -> None:
    """As docs/durability.md says."""
    for what in (
        "USAGE ON SCHEMA darkroom",
        "SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA darkroom",
        "USAGE ON ALL SEQUENCES IN SCHEMA darkroom",
    ):
        await fleet.sql(f"GRANT {what} TO server")


async def test_another_program_and_a_newer_schema_are_rejected(fleet: Fleet) -> None:
    await fleet.sql("CREATE SCHEMA darkroom")
    await fleet.sql("CREATE TABLE darkroom.mine (x int)")
    with pytest.raises(StartupError, match="of another program"):
        await fleet.join("a")
    await emptied(fleet.url)
    await fleet.join("a")
    newer = len(MIGRATIONS) + 1
    await fleet.sql("UPDATE ledger SET version = $1", newer)
    await fleet.join("older")  # Beside newer servers, as long as they allow it.
    await fleet.sql("UPDATE ledger SET oldest = $1", newer)
    with pytest.raises(StartupError, match=f"has schema {newer}, of a newer darkroom-server"):
        await fleet.join("b")


async def test_a_database_that_is_killed_loses_nothing_and_an_empty_one_is_rejected() -> None:
    with cluster() as own:
        ledger = PostgresLedger(own.url, retention=300.0)
        await ledger.open()
        begun = await ledger.begin(draft(inputs={"x": b"1"}), claimed=True)
        own.kill()
        for operation in (ledger.find(JOB), ledger.begin(draft("new"), claimed=True)):
            with pytest.raises(LedgerUnreachable, match="try again in 1 s"):
                await operation
        with pytest.raises(LedgerUnreachable):
            await ledger.beat()
        own.start()
        returned = False
        while not returned:
            with suppress(LedgerUnreachable):
                returned = (await ledger.beat()).returned
        assert [entry.hold for entry in await ledger.mine()] == [begun.entry.hold]
        assert await ledger.inputs(JOB) == {"x": b"1"}
        await emptied(own.url)
        with pytest.raises(LedgerUnreachable):
            await ledger.find(JOB)
        own.kill()
        own.start()
        why = ""
        while "it had one when this server started" not in why:
            with pytest.raises(LedgerUnreachable) as caught:
                await ledger.beat()
            why = str(caught.value)
        await ledger.close()


async def test_what_cannot_be_reached_at_the_start_is_one_line(postgresql: Cluster) -> None:
    url = "postgresql://user:secret@127.0.0.1:1/none?password=other"
    with pytest.raises(
        StartupError, match=r"cannot use --ledger postgresql://127\.0\.0\.1:1/none:"
    ) as caught:
        await PostgresLedger(url).open()
    assert "secret" not in str(caught.value)
    assert "other" not in str(caught.value)
    with pytest.raises(StartupError, match="does not exist"):
        await PostgresLedger(postgresql.database("missing")).open()


@pytest.mark.parametrize(
    ("url", "used"),
    [
        ("postgresql://a@127.0.0.1:5432/x", None),
        ("postgresql://a@[::1]/x", None),
        ("postgresql://localhost/x", None),
        ("postgresql:///x?host=/run/postgresql", None),
        ("postgresql://a@%2Frun%2Fpostgresql/x", None),
        ("postgresql://a@db/x", "postgresql://a@db/x?sslmode=verify-full"),
        ("postgresql://db,127.0.0.1/x?a=b", "postgresql://db,127.0.0.1/x?a=b&sslmode=verify-full"),
        ("postgresql://db/x?sslmode=verify-full", None),
    ],
)
def test_beyond_this_machine_connections_are_verified(url: str, used: str | None) -> None:
    assert check_url(url) == (used or url)


@pytest.mark.parametrize("mode", ["disable", "prefer", "require", "verify-ca"])
def test_weaker_modes_are_rejected_beyond_this_machine(mode: str) -> None:
    with pytest.raises(StartupError, match="use sslmode=verify-full"):
        PostgresLedger(f"postgresql://a@db.example/x?sslmode={mode}")
    assert check_url(f"postgresql://a@127.0.0.1/x?sslmode={mode}")


def test_a_host_of_the_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "db.example")
    assert check_url("postgresql:///x").endswith("?sslmode=verify-full")
    assert database_name("postgresql://a:b@db:1/x?password=c") == "postgresql://db:1/x"
