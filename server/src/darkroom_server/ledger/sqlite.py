"""The ledger in an SQLite file: a server that is killed and started again loses nothing."""

import json
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from darkroom_server.core.errors import Failure, LedgerUnreachable, RequestConflict, StartupError
from darkroom_server.core.ledger import (
    Begun,
    Draft,
    Entry,
    Hold,
    Key,
    Models,
    ServerEntry,
    Standing,
)
from darkroom_server.ledger.changes import Changes
from darkroom_server.ledger.input_limits import NO_LIMITS, InputLimits
from darkroom_server.ledger.rows import entry_of, runtime_of
from darkroom_server.ledger.rules import (
    EXPIRED_AT_ONCE,
    LATE,
    failure_text,
    queue_is_full,
    too_many_jobs,
)
from darkroom_server.ledger.sqlite_file import BUSY_SECONDS, LedgerFile, open_ledger_file
from darkroom_server.ledger.sqlite_inputs import add_inputs, drop_inputs, make_room
from darkroom_server.ledger.writer import Writer

TRIM_ENTRIES = 500
"""The most entries that one operation deletes, so that it does not hold up the others."""

T = TypeVar("T")

KEY = "caller = ? AND request_id = ?"

MAY_RUN = "(model = ? AND coalesce(runtime, '') IN ('', ?))"

OFFERED = (
    "NOT EXISTS (SELECT 1 FROM json_each(jobs.needs) AS need "
    "WHERE need.value NOT IN (SELECT value FROM json_each(?)))"
)


LATE_JOBS = (
    "SELECT caller, request_id FROM jobs WHERE state = 0 AND goal <= ? AND deadline <= ? LIMIT ?"
)
"""The index of goals finds them: no deadline is before its goal."""


class SqliteLedger:
    """Keeps entries in the file ``path``, which one server at a time has open.

    Entries that ended are kept for ``retention`` seconds, and inputs within ``inputs``.
    ``clock``: seconds since the epoch.
    """

    durable = True

    def __init__(
        self,
        path: Path,
        *,
        name: str = "",
        retention: float = 0.0,
        inputs: InputLimits = NO_LIMITS,
        clock: Callable[[], float] = time.time,
        busy_seconds: float = BUSY_SECONDS,
    ) -> None:
        self._path = path
        self._name = name
        self._retention = retention
        self._input_limits = inputs
        self._clock = clock
        self._busy_seconds = busy_seconds
        self._changes = Changes()
        self._me = 0
        self._file: LedgerFile | None = None
        self._writer: Writer | None = None

    async def open(self) -> int:
        """As ``Ledger.open``: the lock proves that every earlier server has ended."""
        self._file = open_ledger_file(self._path, busy_seconds=self._busy_seconds)
        self._writer = Writer(self._file.connection)
        try:
            self._me, lost = await self._writer.run(self._enter)
        except LedgerUnreachable as error:
            await self.close()
            raise StartupError(f"cannot use --ledger sqlite:{self._path}: {error}") from None
        return lost

    async def close(self) -> None:
        """As ``Ledger.close``."""
        if self._writer is not None and self._file is not None:
            await self._writer.close()
            os.close(self._file.lock)
            self._writer = self._file = None

    async def begin(self, draft: Draft, *, claimed: bool) -> Begun:
        """As ``Ledger.begin``."""
        begun = await self._run(lambda db: self._begin(db, draft, claimed))
        if begun.new:
            self._changes.publish(draft.key)
        return begun

    async def claim(
        self,
        room: int,
        *,
        models: Models | None = None,
        key: Key | None = None,
        delay: float = 0.0,
    ) -> list[Entry]:
        """As ``Ledger.claim``; no other server has a model in memory."""
        late, entries = await self._run(lambda db: self._claim(db, room, models, key))
        self._changes.publish(*late, *(entry.key for entry in entries))
        return entries

    async def end(self, hold: Hold, standing: Standing, failure: Failure | None = None) -> bool:
        """As ``Ledger.end``."""
        if ended := await self._run(lambda db: self._end(db, hold, standing, failure)):
            self._changes.publish(hold.key)
        return ended

    async def release(self, holds: Sequence[Hold]) -> int:
        """As ``Ledger.release``."""
        released = await self._run(lambda db: self._release(db, holds))
        self._changes.publish(*(hold.key for hold in holds))
        return released

    async def find(self, key: Key) -> Entry | None:
        """As ``Ledger.find``."""
        return await self._run(lambda db: self._find(db, key))

    async def cancel(self, key: Key) -> Entry | None:
        """As ``Ledger.cancel``."""
        entry = await self._run(lambda db: self._cancel(db, key))
        self._changes.publish(key)
        return entry

    async def again(self, key: Key, runtime: str | None) -> Entry | None:
        """As ``Ledger.again``."""
        entry = await self._run(lambda db: self._again(db, key, runtime))
        self._changes.publish(key)
        return entry

    async def mine(self) -> list[Entry]:
        """As ``Ledger.mine``: all of them, as there is no other server."""
        return await self._run(
            lambda db: [self._entry(row) for row in db.execute("SELECT * FROM jobs ORDER BY id")]
        )

    async def inputs(self, key: Key) -> dict[str, bytes]:
        """As ``Ledger.inputs``."""
        statement = (
            "SELECT digest, data FROM inputs JOIN job_inputs USING (digest) "
            f"JOIN jobs ON jobs.id = job_inputs.job WHERE {KEY}"
        )
        return await self._run(
            lambda db: {row["digest"]: row["data"] for row in db.execute(statement, key)}
        )

    async def forget(self, holds: Sequence[Hold]) -> None:
        """As ``Ledger.forget``."""
        statement = f"DELETE FROM jobs WHERE {KEY} AND epoch = ? AND state >= 2"
        values = [(*key, epoch) for key, epoch in holds]
        await self._run(lambda db: db.executemany(statement, values).rowcount)

    async def renew(self) -> None:
        """As ``Ledger.renew``."""
        await self._run(self._renew)

    async def servers(self) -> list[ServerEntry]:
        """As ``Ledger.servers``."""
        return await self._run(
            lambda db: [
                ServerEntry(id=row["id"], name=row["name"], age=self._since(row["opened_at"]))
                for row in db.execute("SELECT * FROM servers ORDER BY id")
            ]
        )

    def changes(self) -> AsyncIterator[Key]:
        """As ``Ledger.changes``."""
        return self._changes.listen()

    # On the writer's thread, each inside a transaction.

    def _enter(self, db: sqlite3.Connection) -> tuple[int, int]:
        now = self._clock()
        lost = db.execute(
            "UPDATE jobs SET state = 0, owner = NULL, epoch = epoch + 1, losses = losses + 1 "
            "WHERE state = 1"
        ).rowcount
        db.execute("DELETE FROM servers")
        inserted = db.execute(
            "INSERT INTO servers (name, opened_at, renewed_at) VALUES (?, ?, ?)",
            (self._name, now, now),
        )
        self._trim(db)
        assert inserted.lastrowid is not None
        return inserted.lastrowid, lost

    def _begin(self, db: sqlite3.Connection, draft: Draft, claimed: bool) -> Begun:
        now = self._clock()
        row = db.execute(f"SELECT * FROM jobs WHERE {KEY}", draft.key).fetchone()
        accepted_at = now - draft.age
        deadline = None if draft.deadline is None else accepted_at + draft.deadline
        epoch = 1
        if row is not None:
            if row["fingerprint"] != draft.fingerprint:
                raise RequestConflict(draft.key.request_id)
            if row["state"] < Standing.FINISHED:
                kept = None
                if row["deadline"] is not None and deadline is not None:
                    kept = max(row["deadline"], deadline)
                db.execute(
                    "UPDATE jobs SET deadline = ?, detached = detached OR ? WHERE id = ?",
                    (kept, draft.detached, row["id"]),
                )
            if row["state"] <= Standing.FINISHED:
                return Begun(self._found(db, draft.key), new=False)
            epoch = row["epoch"] + 1
        self._check(db, draft, claimed)
        db.execute(f"DELETE FROM jobs WHERE {KEY}", draft.key)
        job = db.execute(
            "INSERT INTO jobs (caller, request_id, fingerprint, record, model, counted_as, "
            "detached, goal, accepted_at, deadline, state, owner, epoch, runtime, needs) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *draft.key,
                draft.fingerprint,
                draft.record,
                draft.model,
                draft.counted_as,
                draft.detached,
                accepted_at + draft.goal,
                accepted_at,
                deadline,
                Standing.CLAIMED if claimed else Standing.QUEUED,
                self._me if claimed else None,
                epoch,
                runtime_of(draft, claimed=claimed),
                json.dumps(sorted(draft.needs)),
            ),
        ).lastrowid
        add_inputs(db, job, draft)
        return Begun(self._found(db, draft.key), new=True)

    def _check(self, db: sqlite3.Connection, draft: Draft, claimed: bool) -> None:
        """Raise ``QuotaExceeded`` or ``QueueFull`` if the draft has no place."""
        if draft.max_queued is not None and not claimed:
            (queued,) = db.execute("SELECT count(*) FROM jobs WHERE state = 0").fetchone()
            if queued >= draft.max_queued:
                raise queue_is_full(queued)
        if draft.max_live is not None:
            (live,) = db.execute(
                "SELECT count(*) FROM jobs WHERE counted_as = ? AND state < 2", (draft.counted_as,)
            ).fetchone()
            if live >= draft.max_live:
                raise too_many_jobs(draft, live)
        if draft.inputs:
            make_room(db, draft, self._input_limits)

    def _claim(
        self,
        db: sqlite3.Connection,
        room: int,
        models: Models | None,
        key: Key | None,
    ) -> tuple[list[Key], list[Entry]]:
        """The jobs that ended as they were late, and those that this server has now."""
        conditions, values = ["state = 0"], list[str | float]()
        late: list[Key] = []
        if key is not None:
            conditions.append(KEY)
            values += key
        else:
            now = self._clock()
            late = self._expire(db, now)
            conditions.append("(deadline IS NULL OR deadline > ?)")
            values.append(now)
        runtimes = {} if models is None else models.runtimes
        if models is not None:
            either = " OR ".join([MAY_RUN] * len(runtimes))
            conditions.append(f"({either or 'FALSE'})")
            values += [part for pair in runtimes.items() for part in pair]
            if models.offers is not None:
                conditions.append(OFFERED)
                values.append(json.dumps(sorted(models.offers)))
        rows = db.execute(
            f"SELECT id, caller, request_id, model FROM jobs WHERE {' AND '.join(conditions)} "
            "ORDER BY goal, id LIMIT ?",
            (*values, room),
        ).fetchall()
        for row in rows:
            db.execute(
                "UPDATE jobs SET state = 1, owner = ?, epoch = epoch + 1, "
                "runtime = CASE WHEN runtime = '' THEN ? ELSE runtime END WHERE id = ?",
                (self._me, runtimes.get(row["model"], ""), row["id"]),
            )
        return late, [self._found(db, Key(row["caller"], row["request_id"])) for row in rows]

    def _expire(self, db: sqlite3.Connection, now: float) -> list[Key]:
        rows = db.execute(LATE_JOBS, (now, now, EXPIRED_AT_ONCE)).fetchall()
        keys = [Key(row["caller"], row["request_id"]) for row in rows]
        for key in keys:
            db.execute(
                f"UPDATE jobs SET state = ?, ended_at = ?, failure = ? WHERE {KEY}",
                (Standing.EXPIRED, now, failure_text(LATE), *key),
            )
            drop_inputs(db, key)
        return keys

    def _end(
        self, db: sqlite3.Connection, hold: Hold, standing: Standing, failure: Failure | None
    ) -> bool:
        ended = db.execute(
            f"UPDATE jobs SET state = ?, owner = ?, ended_at = ?, failure = ? WHERE {KEY} "
            "AND epoch = ? AND (state = 0 OR (state = 1 AND owner = ?))",
            (
                standing,
                self._me,
                self._clock(),
                failure_text(failure),
                *hold.key,
                hold.epoch,
                self._me,
            ),
        ).rowcount
        if ended and standing is not Standing.FINISHED:
            drop_inputs(db, hold.key)
        self._trim(db)
        return bool(ended)

    def _release(self, db: sqlite3.Connection, holds: Sequence[Hold]) -> int:
        return sum(
            db.execute(
                f"UPDATE jobs SET state = 0, owner = NULL, epoch = epoch + 1 WHERE {KEY} "
                "AND epoch = ? AND state = 1 AND owner = ?",
                (*hold.key, hold.epoch, self._me),
            ).rowcount
            for hold in holds
        )

    def _cancel(self, db: sqlite3.Connection, key: Key) -> Entry | None:
        cancelled = db.execute(
            f"UPDATE jobs SET state = ?, ended_at = ? WHERE {KEY} AND state = 0",
            (Standing.CANCELLED, self._clock(), *key),
        ).rowcount
        if cancelled:
            drop_inputs(db, key)
        return self._find(db, key)

    def _again(self, db: sqlite3.Connection, key: Key, runtime: str | None) -> Entry | None:
        if runtime is None:
            return None
        claimed = db.execute(
            "UPDATE jobs SET state = 1, owner = ?, epoch = epoch + 1, ended_at = NULL, "
            f"deadline = NULL WHERE {KEY} AND state = ? AND coalesce(runtime, '') IN ('', ?)",
            (self._me, *key, Standing.FINISHED, runtime),
        ).rowcount
        return self._find(db, key) if claimed else None

    def _renew(self, db: sqlite3.Connection) -> None:
        db.execute("UPDATE servers SET renewed_at = ? WHERE id = ?", (self._clock(), self._me))
        self._trim(db)

    def _trim(self, db: sqlite3.Connection) -> None:
        db.execute(
            "DELETE FROM jobs WHERE id IN "
            "(SELECT id FROM jobs WHERE state >= 2 AND ended_at <= ? ORDER BY ended_at LIMIT ?)",
            (self._clock() - self._retention, TRIM_ENTRIES),
        )

    def _find(self, db: sqlite3.Connection, key: Key) -> Entry | None:
        row = db.execute(f"SELECT * FROM jobs WHERE {KEY}", key).fetchone()
        return None if row is None else self._entry(row)

    def _found(self, db: sqlite3.Connection, key: Key) -> Entry:
        return self._entry(db.execute(f"SELECT * FROM jobs WHERE {KEY}", key).fetchone())

    def _entry(self, row: sqlite3.Row) -> Entry:
        return entry_of(row, self._clock(), json.loads(row["needs"]))

    def _since(self, moment: float) -> float:
        # The clock of a machine may be set back.
        return max(0.0, self._clock() - moment)

    async def _run(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        if self._writer is None:
            raise RuntimeError("the ledger is not open")
        return await self._writer.run(operation)
