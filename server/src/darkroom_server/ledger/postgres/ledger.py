"""The ledger in PostgreSQL: several servers share it, and take over what one of them loses."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import asyncpg

from darkroom_server.core.errors import Failure, StartupError
from darkroom_server.core.ledger import (
    LEASE_SECONDS,
    Announcement,
    Begun,
    Draft,
    Entry,
    Hold,
    Key,
    Listed,
    Models,
    Pulse,
    ServerEntry,
    Standing,
)
from darkroom_server.ledger.changes import Changes
from darkroom_server.ledger.input_limits import NO_LIMITS, InputLimits
from darkroom_server.ledger.postgres.acceptance import accept
from darkroom_server.ledger.postgres.claims import claiming
from darkroom_server.ledger.postgres.connections import (
    OPERATION_SECONDS,
    Connections,
    check_url,
    database_name,
    unreachable,
)
from darkroom_server.ledger.postgres.inputs import collect, drop_inputs
from darkroom_server.ledger.postgres.rows import KEY, NOW, columns, entry_of
from darkroom_server.ledger.postgres.schema import prepare
from darkroom_server.ledger.postgres.session import CHANNEL, Session
from darkroom_server.ledger.rules import failure_text

TRIM_ENTRIES = 500
"""The most entries that one statement deletes, so that it does not hold up the others."""


class PostgresLedger:
    """Keeps entries in the database at ``url``, which other servers use at the same time.

    Entries that ended are kept for ``retention`` seconds, and inputs within ``inputs``. ``now``:
    SQL for the time in seconds. ``settle``: seconds after a restart of the database or of this
    server's connection in which it takes no other one for dead: all have lost their connections,
    and come back. The constructor raises ``StartupError`` for a URL that is not safe.
    """

    durable = True

    def __init__(
        self,
        url: str,
        *,
        name: str = "",
        retention: float = 0.0,
        inputs: InputLimits = NO_LIMITS,
        now: Callable[[], str] = lambda: NOW,
        settle: float = LEASE_SECONDS,
    ) -> None:
        self._url = check_url(url)
        self._retention = retention
        self._input_limits = inputs
        self._now = now
        self._changes = Changes()
        self._connections = Connections(self._url, name)
        self._session = Session(self._connections, name, now, settle)

    async def open(self) -> int:
        """As ``Ledger.open``: what dead servers had is queued again."""
        database = database_name(self._url)
        try:
            ledger_id = await _prepared(self._connections, database)
            await self._connections.open(ledger_id)
            return await self._session.open()
        except BaseException as error:
            await self.close()
            if (away := unreachable(error)) is None:
                raise
            raise StartupError(f"cannot use --ledger {database}: {away}") from None

    async def close(self) -> None:
        """As ``Ledger.close``: the others need not wait for the lease to run out."""
        try:
            await self._session.close()
        except Exception as error:
            if unreachable(error) is None:
                raise
        finally:
            await self._connections.close()

    async def begin(self, draft: Draft, *, claimed: bool) -> Begun:
        """As ``Ledger.begin``."""
        begun = await self._connections.run(
            lambda db: accept(
                db,
                draft,
                me=self.id,
                claimed=claimed,
                front=self._session.front.goal,
                limits=self._input_limits,
                now=self._now,
            )
        )
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
        """As ``Ledger.claim``; what another server claims at this moment is skipped."""
        statement, values = claiming(
            room, self.id, models, key, delay, front=self._session.front.goal, now=self._now()
        )
        rows = await self._fetch(statement, *values)
        entries = [entry_of(row) for row in sorted(rows, key=lambda r: (r["goal"], r["id"]))]
        self._changes.publish(*(entry.key for entry in entries))
        return [entry for entry in entries if entry.standing is Standing.CLAIMED]

    async def end(self, hold: Hold, standing: Standing, failure: Failure | None = None) -> bool:
        """As ``Ledger.end``."""
        statement = (
            f"UPDATE jobs SET state = $3, owner = $4, ended_at = {self._now()}, failure = $5 "
            f"WHERE {KEY} AND epoch = $6 AND (state = 0 OR (state = 1 AND owner = $4)) RETURNING id"
        )

        async def end(db: asyncpg.Connection) -> bool:
            job = await db.fetchval(
                statement, *hold.key, standing, self.id, failure_text(failure), hold.epoch
            )
            if job is not None and standing is not Standing.FINISHED:
                await drop_inputs(db, job)
            return job is not None

        if ended := await self._connections.run(end):
            self._changes.publish(hold.key)
        return ended

    async def release(self, holds: Sequence[Hold]) -> int:
        """As ``Ledger.release``."""
        released = await self._fetch(
            "UPDATE jobs SET state = 0, owner = NULL, epoch = jobs.epoch + 1, "
            f"queued_at = {self._now()} "
            "FROM unnest($1::text[], $2::text[], $3::int[]) AS held (caller, request_id, epoch) "
            "WHERE jobs.caller = held.caller AND jobs.request_id = held.request_id "
            "AND jobs.epoch = held.epoch AND state = 1 AND owner = $4 "
            f"RETURNING pg_notify('{CHANNEL}', goal::text)",
            [hold.key.caller for hold in holds],
            [hold.key.request_id for hold in holds],
            [hold.epoch for hold in holds],
            self.id,
        )
        self._changes.publish(*(hold.key for hold in holds))
        return len(released)

    async def find(self, key: Key) -> Entry | None:
        """As ``Ledger.find``."""
        return await self._one(f"SELECT {self._columns} FROM jobs WHERE {KEY}", *key)

    async def cancel(self, key: Key) -> Entry | None:
        """As ``Ledger.cancel``."""

        async def cancel(db: asyncpg.Connection) -> Entry | None:
            job = await db.fetchval(
                f"UPDATE jobs SET state = $3, ended_at = {self._now()} WHERE {KEY} AND state = 0 "
                "RETURNING id",
                *key,
                Standing.CANCELLED,
            )
            if job is not None:
                await drop_inputs(db, job)
            row = await db.fetchrow(f"SELECT {self._columns} FROM jobs WHERE {KEY}", *key)
            return None if row is None else entry_of(row)

        entry = await self._connections.run(cancel)
        self._changes.publish(key)
        return entry

    async def again(self, key: Key, runtime: str | None) -> Entry | None:
        """As ``Ledger.again``; of a server that lives only that one may claim it."""
        fits = "($5::text IS NOT NULL AND coalesce(runtime, '') IN ('', $5))"
        entry = await self._one(
            f"UPDATE jobs SET state = CASE WHEN {fits} THEN 1 ELSE 0 END, "
            f"owner = CASE WHEN {fits} THEN $3::bigint END, epoch = epoch + 1, ended_at = NULL, "
            f"deadline = NULL, queued_at = {self._now()} "
            f"WHERE {KEY} AND state = $4 AND (owner = $3 OR "
            "NOT EXISTS (SELECT 1 FROM servers WHERE servers.id = jobs.owner)) "
            f"RETURNING {self._columns}, pg_notify('{CHANNEL}', goal::text)",
            *key,
            self.id,
            Standing.FINISHED,
            runtime,
        )
        self._changes.publish(key)
        return entry

    async def mine(self) -> list[Entry]:
        """As ``Ledger.mine``."""
        rows = await self._fetch(
            f"SELECT {self._columns} FROM jobs WHERE owner = $1 ORDER BY id", self.id
        )
        return [entry_of(row) for row in rows]

    async def inputs(self, key: Key) -> dict[str, bytes]:
        """As ``Ledger.inputs``."""
        rows = await self._fetch(
            "SELECT digest, data FROM inputs JOIN job_inputs USING (digest) "
            f"JOIN jobs ON jobs.id = job_inputs.job WHERE {KEY}",
            *key,
        )
        return {row["digest"]: row["data"] for row in rows}

    async def forget(self, holds: Sequence[Hold]) -> None:
        """As ``Ledger.forget``."""

        async def forget(db: asyncpg.Connection) -> None:
            for key, epoch in holds:
                await db.execute(
                    f"DELETE FROM jobs WHERE {KEY} AND epoch = $3 AND state >= 2", *key, epoch
                )
            await collect(db)

        await self._connections.run(forget)

    async def renew(self) -> None:
        """As ``Ledger.renew``; ``beat`` notes that this server lives."""

        async def trim(db: asyncpg.Connection) -> None:
            await db.execute(
                "DELETE FROM jobs WHERE id IN (SELECT id FROM jobs WHERE state >= 2 "
                f"AND ended_at <= {self._now()} - $1 ORDER BY ended_at LIMIT $2 "
                "FOR UPDATE SKIP LOCKED)",
                self._retention,
                TRIM_ENTRIES,
            )
            await collect(db)

        await self._connections.run(trim)

    async def servers(self) -> list[ServerEntry]:
        """As ``Ledger.servers``."""
        rows = await self._fetch(
            f"SELECT *, {self._now()} - opened_at AS age FROM servers ORDER BY id"
        )
        return [
            ServerEntry(
                id=row["id"],
                name=row["name"],
                age=max(0.0, row["age"]),
                address=row["address"],
                key=row["key"],
                certificate=row["certificate"],
            )
            for row in rows
        ]

    def changes(self) -> AsyncIterator[Key]:
        """As ``Ledger.changes``, of what this server does."""
        return self._changes.listen()

    # Of a ledger that is shared.

    @property
    def id(self) -> int:
        """As ``SharedLedger.id``."""
        return self._session.id

    @property
    def news(self) -> asyncio.Event:
        """As ``SharedLedger.news``."""
        return self._session.news

    def announce(self, announcement: Announcement) -> None:
        """As ``SharedLedger.announce``."""
        self._session.announcement = announcement

    async def of_caller(self, caller: str, most: int, before: int | None) -> list[Listed]:
        """As ``SharedLedger.of_caller``."""
        rows = await self._fetch(
            f"SELECT {self._columns} FROM jobs WHERE caller = $1 "
            "AND ($2::bigint IS NULL OR id < $2) ORDER BY id DESC LIMIT $3",
            caller,
            before,
            most,
        )
        return [Listed(row["id"], entry_of(row)) for row in rows]

    async def drop(self, hold: Hold) -> bool:
        """As ``SharedLedger.drop``."""
        dropped = await self._fetch(
            f"DELETE FROM jobs WHERE {KEY} AND epoch = $3 AND state = 1 AND owner = $4 "
            "AND calls_at = $4 RETURNING id",
            *hold.key,
            hold.epoch,
            self.id,
        )
        if dropped:
            self._changes.publish(hold.key)
        return bool(dropped)

    async def beat(self) -> Pulse:
        """As ``SharedLedger.beat``."""
        session = self._session
        try:
            async with asyncio.timeout(OPERATION_SECONDS):
                returned = await session.renew()
                reclaimed = 0
                if session.volunteers():
                    reclaimed = await session.reap()
                    await session.expire()
                queued, servers = await session.look()
            extended = await self._fetch(
                "UPDATE jobs SET extended = false WHERE owner = $1 AND state = 1 AND extended "
                f"RETURNING {self._columns}",
                self.id,
            )
        except Exception as error:
            session.drop()
            if (away := unreachable(error)) is None:
                raise
            raise away from None
        return Pulse(queued, servers, reclaimed, returned, tuple(map(entry_of, extended)))

    @property
    def _columns(self) -> str:
        return columns(self._now())

    async def _fetch(self, statement: str, *values: Any) -> list[Any]:
        rows: list[Any] = await self._connections.run(lambda db: db.fetch(statement, *values))
        return rows

    async def _one(self, statement: str, *values: Any) -> Entry | None:
        row = await self._connections.run(lambda db: db.fetchrow(statement, *values))
        return None if row is None else entry_of(row)


async def migrate(url: str) -> str:
    """Create or migrate the schema at ``url``; returns a line about it. Raises ``StartupError``."""
    database = database_name(url)
    connections = Connections(check_url(url), "migration")
    try:
        ledger_id = await _prepared(connections, database)
    except Exception as error:
        if (away := unreachable(error)) is None:
            raise
        raise StartupError(f"cannot use --ledger {database}: {away}") from None
    return f"the ledger {ledger_id} in {database} is ready"


async def _prepared(connections: Connections, database: str) -> str:
    """The id of the ledger, whose schema is this server's."""
    connection = await connections.connect(checked=False)
    try:
        return await prepare(connection, database)
    finally:
        await connection.close()
