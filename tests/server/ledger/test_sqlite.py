"""The SQLite ledger's file: who may read it, what a kill leaves, and when it cannot be used."""

import asyncio
import sqlite3
import stat
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from darkroom_server.core.errors import LedgerUnreachable, StartupError
from darkroom_server.core.ledger import Key, Standing
from darkroom_server.ledger import sqlite_file
from darkroom_server.ledger.sqlite import SqliteLedger
from tests.server.ledger.conftest import draft
from tests.server.ledger.copies import left_behind

DATA = Path(__file__).with_name("data")
"""With the dumps of servers of earlier schemas that were killed."""


@asynccontextmanager
async def opened(path: Path, **options: Any) -> AsyncIterator[SqliteLedger]:
    ledger = SqliteLedger(path, **{"retention": 300.0, **options})
    await ledger.open()
    try:
        yield ledger
    finally:
        await ledger.close()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def test_only_its_user_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    path.touch(0o644)
    async with opened(path) as ledger:
        await ledger.begin(draft(), claimed=True)
        files = sorted(file.name for file in tmp_path.iterdir())
        assert files == ["jobs.db", "jobs.db-shm", "jobs.db-wal", "jobs.db.lock"]
        assert {mode(file) for file in tmp_path.iterdir()} == {0o600}


async def test_a_second_server_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    async with opened(path):
        with pytest.raises(StartupError, match=r"another server has the ledger .*jobs\.db"):
            await SqliteLedger(path).open()
    async with opened(path):
        pass


async def test_what_a_killed_server_leaves(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    async with opened(path) as ledger:
        await ledger.begin(draft("waits", goal=5.0), claimed=False)
        runs = await ledger.begin(draft("runs", goal=9.0, inputs={"a": b"pixels"}), claimed=True)
        done = await ledger.begin(draft("done"), claimed=True)
        await ledger.end(done.entry.hold, Standing.FINISHED)
        copy = left_behind(path)
    async with opened(copy) as ledger:
        found = {entry.key.request_id: entry for entry in await ledger.mine()}
        assert {id: entry.standing for id, entry in found.items()} == {
            "waits": Standing.QUEUED,
            "runs": Standing.QUEUED,
            "done": Standing.FINISHED,
        }
        assert {id: entry.losses for id, entry in found.items()} == {
            "waits": 0,
            "runs": 1,
            "done": 0,
        }
        assert await ledger.inputs(Key("ada", "runs")) == {"a": b"pixels"}
        # The dead server comes too late.
        assert not await ledger.end(runs.entry.hold, Standing.FINISHED)
        assert [each.key.request_id for each in await ledger.claim(5)] == ["waits", "runs"]
        copy = left_behind(copy, "again.db")
    again = SqliteLedger(copy, retention=300.0)
    assert await again.open() == 2
    runs_again = await again.find(Key("ada", "runs"))
    assert runs_again is not None
    assert runs_again.losses == 2
    await again.close()


async def test_a_server_that_stops_leaves_no_trace_of_what_was_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    secret = b"a prompt that nobody else may read" * 200
    async with opened(path) as ledger:
        begun = await ledger.begin(draft(record=secret, inputs={"a": secret}), claimed=True)
        await ledger.begin(draft("other"), claimed=True)
        assert secret[:34] in Path(f"{path}-wal").read_bytes()
        await ledger.end(begun.entry.hold, Standing.FINISHED)
        await ledger.forget([begun.entry.hold])
    assert secret[:34] not in path.read_bytes()
    assert not Path(f"{path}-wal").exists()
    assert b"record of other" in path.read_bytes()


async def test_it_is_migrated_and_never_read_by_an_older_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "jobs.db"
    async with opened(path) as ledger:
        await ledger.begin(draft(), claimed=True)
    newer = (*sqlite_file.MIGRATIONS, "ALTER TABLE jobs ADD COLUMN mood TEXT DEFAULT 'calm';")
    with monkeypatch.context() as patch:
        patch.setattr(sqlite_file, "MIGRATIONS", newer)
        async with opened(path) as ledger:
            assert [entry.key.request_id for entry in await ledger.mine()] == ["job"]
        # A migration that fails leaves what was there.
        patch.setattr(sqlite_file, "MIGRATIONS", (*newer, "DROP TABLE jobs; DROP TABLE missing;"))
        with pytest.raises(StartupError, match="no such table: missing"):
            await SqliteLedger(path).open()
        patch.setattr(sqlite_file, "MIGRATIONS", newer)
        async with opened(path) as ledger:
            assert [entry.key.request_id for entry in await ledger.mine()] == ["job"]
    with pytest.raises(StartupError, match=f"has schema {len(newer)}, of a newer"):
        await SqliteLedger(path).open()


@pytest.mark.parametrize("schema", [1, 2])
async def test_a_ledger_of_an_earlier_schema_is_migrated(tmp_path: Path, schema: int) -> None:
    path = tmp_path / "jobs.db"
    db = sqlite3.connect(path)
    db.executescript((DATA / f"sqlite_schema_{schema}.sql").read_text())
    # A dump has neither of these.
    db.execute(f"PRAGMA application_id = {sqlite_file.APPLICATION_ID}")
    db.execute(f"PRAGMA user_version = {schema}")
    db.close()
    async with opened(path, retention=1e12) as ledger:
        found = {id: await ledger.find(Key("ada", id)) for id in ("waits", "runs", "done")}
        standings = {id: e and (e.standing, e.losses, e.needs) for id, e in found.items()}
        assert standings == {
            "waits": (Standing.QUEUED, 0, frozenset()),
            "runs": (Standing.QUEUED, 1, frozenset()),
            "done": (Standing.FINISHED, 0, frozenset()),
        }
        runs = found["runs"]
        assert runs is not None
        assert runs.runtime == (None if schema == 1 else "fast")
        assert await ledger.inputs(Key("ada", "waits")) == {"digest": b"a picture"}
        await ledger.begin(draft("exact", runtime="fast"), claimed=True)
        exact = await ledger.find(Key("ada", "exact"))
        assert exact is not None
        assert exact.runtime == "fast"


async def test_another_file_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE recipes (name TEXT)")
    db.close()
    with pytest.raises(StartupError, match="is a database of another program"):
        await SqliteLedger(other).open()
    text = tmp_path / "notes.txt"
    text.write_bytes(b"not a database at all, but long enough to have a header" * 20)
    with pytest.raises(StartupError, match="file is not a database"):
        await SqliteLedger(text).open()
    with pytest.raises(StartupError, match="; --ledger needs a file in a folder"):
        await SqliteLedger(text / "jobs.db").open()
    async with opened(tmp_path / "new" / "jobs.db"):
        assert mode(tmp_path / "new") == 0o700


async def test_a_locked_ledger_is_unreachable_until_it_is_free(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    async with opened(path, busy_seconds=0.01) as ledger:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerUnreachable, match="database is locked") as raised:
            await ledger.begin(draft(), claimed=True)
        assert raised.value.retry_after == 1.0
        other.execute("ROLLBACK")
        other.close()
        assert (await ledger.begin(draft(), claimed=True)).new


async def test_a_full_disk_fails_what_does_not_fit_and_nothing_else(tmp_path: Path) -> None:
    async with opened(tmp_path / "jobs.db") as ledger:
        await ledger.begin(draft("before"), claimed=True)
        await ledger._run(lambda db: db.execute("PRAGMA max_page_count = 40").fetchall())
        release = hold_up(ledger)
        small = [asyncio.create_task(ledger.begin(draft(str(n)), claimed=True)) for n in range(3)]
        large = asyncio.create_task(
            ledger.begin(draft("large", inputs={"a": bytes(400_000)}), claimed=True)
        )
        await asyncio.sleep(0)
        release.set()
        assert all(begun.new for begun in await asyncio.gather(*small))
        with pytest.raises(LedgerUnreachable, match="database or disk is full"):
            await large
        assert len(await ledger.mine()) == 4
        assert await ledger.find(Key("ada", "large")) is None


async def test_what_comes_during_a_commit_shares_the_next_one(tmp_path: Path) -> None:
    async with opened(tmp_path / "jobs.db") as ledger:
        statements: list[str] = []
        await ledger._run(lambda db: db.set_trace_callback(statements.append))
        statements.clear()
        release = hold_up(ledger)
        begins = [asyncio.create_task(ledger.begin(draft(str(n)), claimed=True)) for n in range(50)]
        await asyncio.sleep(0)
        release.set()
        await asyncio.gather(*begins)
        assert statements.count("COMMIT") <= 2


def hold_up(ledger: SqliteLedger) -> threading.Event:
    """Let the ledger's thread wait until the event is set."""
    release, task = threading.Event(), ledger._run(lambda _: release.wait())
    waiting = asyncio.ensure_future(task)
    waiting.add_done_callback(lambda done: done.result())
    return release
