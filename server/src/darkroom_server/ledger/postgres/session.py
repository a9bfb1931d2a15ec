"""A server's presence in a PostgreSQL ledger: its lock, its lease, and the reaping of dead ones."""

import asyncio
import math
import random
import time
from collections.abc import Callable
from typing import Any

from darkroom_server.core.errors import Failure, Reason
from darkroom_server.core.ledger import LEASE_SECONDS, Announcement, Standing
from darkroom_server.ledger.postgres.claims import LATE_JOBS, UNSERVED
from darkroom_server.ledger.postgres.connections import OPERATION_SECONDS, Connections
from darkroom_server.ledger.postgres.front import Front
from darkroom_server.ledger.postgres.inputs import collect
from darkroom_server.ledger.rules import EXPIRED_AT_ONCE, LATE, failure_text

LOCKS = 0x4452
"""The first number of the advisory locks of sessions; the second is the row's ``lock``."""

CHANNEL = "darkroom_queued"
"""Notified when the queue turns from empty to not empty, and with its goal when a job returns."""

UNSERVED_SECONDS = 60.0
"""A queued job that no server can run for so long fails."""

DEAD = """
    DELETE FROM servers s WHERE s.id <> $1
    AND extract(epoch FROM pg_postmaster_start_time()) < {now} - $4
    AND (s.renewed_at < {now} - $3 OR NOT EXISTS (
        SELECT 1 FROM pg_locks l
        WHERE l.locktype = 'advisory' AND l.granted
        AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND l.classid = $2::bigint::oid AND l.objid = s.lock::bigint::oid AND l.objsubid = 2))
    RETURNING s.id
"""
"""Deletes servers that are dead. After a restart of the database nobody has a lock for a moment."""

UNOWNED = """
    UPDATE jobs SET state = 0, owner = NULL, epoch = epoch + 1, losses = losses + 1,
        queued_at = {now}
    WHERE state = 1 AND NOT EXISTS (SELECT 1 FROM servers WHERE servers.id = jobs.owner)
    RETURNING goal
"""
"""Queues what dead servers had; and what one claimed that did not know yet that it was reaped."""

UNCALLED = """
    SELECT id FROM jobs WHERE calls_at IS NOT NULL AND state = 0 AND goal >= $3
        AND NOT EXISTS (SELECT 1 FROM servers WHERE servers.id = jobs.calls_at)
    UNION ALL SELECT id FROM jobs WHERE calls_at IS NOT NULL AND state = 1
        AND NOT EXISTS (SELECT 1 FROM servers WHERE servers.id IN (jobs.calls_at, jobs.owner))
"""
"""Plain jobs whose calls ended with their server. What another server runs, that one cancels."""

VOLUNTEERS = 4
"""About as many servers do what one of them must: at each beat look for dead servers and expired
jobs, and claim at once what a notification is about. The others come with their next beat."""

SWEEP_SECONDS = 5.0
"""Until jobs without an owner are looked for although no server has died."""

ENDED = (
    "UPDATE jobs SET state = $1, ended_at = {now}, failure = $2 WHERE id IN ({which}) RETURNING id"
)


class Session:
    """One server's session: alive while its lock is held and its lease renewed.

    ``now``: SQL for the time in seconds. ``news`` is set when the database notifies.
    """

    def __init__(
        self, connections: Connections, name: str, now: Callable[[], str], settle: float
    ) -> None:
        self.id = 0
        self.news = asyncio.Event()
        self.announcement = Announcement(address="", key="")
        self.front = Front()
        self._connections = connections
        self._name = name
        self._now = now
        self._settle = settle
        self._connection: Any = None
        self._lock = 0
        self._reaps_from = 0.0
        self._swept_at = -math.inf
        self._servers = 1

    async def open(self) -> int:
        """Appear in the ledger; returns how many jobs dead servers had."""
        async with asyncio.timeout(OPERATION_SECONDS):
            await self._enter()
            self._reaps_from = 0.0  # This server had nothing to lose.
            return await self.reap()

    async def close(self) -> None:
        """Disappear from the ledger."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        try:
            async with asyncio.timeout(OPERATION_SECONDS):
                await connection.execute("DELETE FROM servers WHERE id = $1", self.id)
                await connection.close()
        finally:
            connection.terminate()

    async def renew(self) -> bool:
        """Renew the lease; True if this server was cut off: it may have lost what it had.

        Raises the errors of asyncpg.
        """
        returned = False
        try:
            async with asyncio.timeout(OPERATION_SECONDS):
                if self._connection is None or self._connection.is_closed():
                    await self._enter()
                    returned = True
                elif not await self._write("renewed_at = {now}"):
                    await self._insert()  # The others took it for dead.
                    returned = True
        except BaseException:
            self.drop()
            raise
        return returned

    def drop(self) -> None:
        """Close the connection; the next ``renew`` makes another one."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    async def reap(self) -> int:
        """Queue the jobs of dead servers again; returns how many.

        A server that was cut off itself waits for one lease: the others may come back too.
        """
        if time.monotonic() < self._reaps_from:
            return 0
        connection = self._connection
        dead = await connection.fetch(self._sql(DEAD), self.id, LOCKS, LEASE_SECONDS, self._settle)
        if not dead and time.monotonic() < self._swept_at + SWEEP_SECONDS * self._servers:
            return 0
        self._swept_at = time.monotonic()
        gone = Failure(
            Reason.DRAINING, "the server that had the call is gone; send the request again"
        )
        await self._end(UNCALLED, Standing.CANCELLED, gone, self.front.goal)
        queued = await connection.fetch(self._sql(UNOWNED))
        if queued:
            first = min(row["goal"] for row in queued)
            self.front.back(first)
            await connection.execute("SELECT pg_notify($1, $2)", CHANNEL, repr(first))
        return len(queued)

    async def expire(self) -> None:
        """End queued jobs whose deadline passed, and those that no server can run."""
        late = LATE_JOBS.format(front=4, most=3, at="(SELECT {now})")
        await self._end(late, Standing.EXPIRED, LATE, EXPIRED_AT_ONCE, self.front.goal)
        unserved = Failure(
            Reason.MODEL_GONE,
            f"for {UNSERVED_SECONDS:.0f} s no server could run it: none has its model with what "
            "it asks for, such as its adapters, or, if it is exact and had begun, none has the "
            "device, dtype, layout and library versions with which it began; send the request "
            "again",
        )
        await self._end(
            UNSERVED,
            Standing.FAILED,
            unserved,
            EXPIRED_AT_ONCE,
            UNSERVED_SECONDS,
            self.front.goal,
        )
        await collect(self._connection)

    async def _end(self, which: str, standing: Standing, failure: Failure, *values: float) -> None:
        """End the jobs that ``which`` selects, a statement with ``values`` from $3 on."""
        ended = await self._connection.fetch(
            self._sql(ENDED, which=which), standing, failure_text(failure), *values
        )
        if ended:
            jobs = [row["id"] for row in ended]
            await self._connection.execute("DELETE FROM job_inputs WHERE job = ANY ($1)", jobs)

    async def look(self) -> tuple[int, frozenset[int]]:
        """How many entries wait, and which servers there are."""
        row = await self._connection.fetchrow(
            self._sql(
                "SELECT count(*) AS queued, min(goal) AS first, {now} AS now, "
                "ARRAY (SELECT id FROM servers) AS servers FROM jobs WHERE state = 0 AND goal >= $1"
            ),
            self.front.asked(),
        )
        self.front.found(row["first"], row["now"])
        self._servers = len(row["servers"])
        return row["queued"], frozenset(row["servers"])

    def volunteers(self) -> bool:
        """Whether this server does now what one of all must; see ``VOLUNTEERS``."""
        return random.random() < VOLUNTEERS / self._servers

    async def _enter(self) -> None:
        """Connect, take a lock that nobody had, and write it into the ledger."""
        self.drop()
        connection = await self._connections.connect()
        try:
            # Not the number of an earlier session, which may hang at the database and fall later;
            # and not one that is taken, which may be if the sequence began again.
            taken = True
            while taken:
                lock = await connection.fetchval("SELECT nextval('session_locks')")
                taken = not await connection.fetchval(
                    "SELECT pg_try_advisory_lock($1, $2)", LOCKS, lock
                )
            await connection.add_listener(CHANNEL, self._on_news)
        except BaseException:
            connection.terminate()
            raise
        self._connection, self._lock = connection, lock
        self.front.forget()
        self._reaps_from = time.monotonic() + self._settle
        if not self.id or not await self._write("lock = $9, renewed_at = {now}", lock):
            await self._insert()
        self.news.set()

    async def _write(self, changes: str, *values: object) -> bool:
        """Change this server's row; False if it is gone."""
        status: str = await self._connection.execute(
            self._sql(
                "UPDATE servers SET address = $2, key = $3, certificate = $4, models = $5, "
                f"runtimes = $6, held = $7, offers = $8, {changes} WHERE id = $1"
            ),
            self.id,
            *self._announced,
            *values,
        )
        return status == "UPDATE 1"

    async def _insert(self) -> None:
        self.id = await self._connection.fetchval(
            self._sql(
                "INSERT INTO servers (name, lock, address, key, certificate, models, runtimes, "
                "held, offers, opened_at, renewed_at) "
                "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, {now}, {now}) RETURNING id"
            ),
            self._name,
            self._lock,
            *self._announced,
        )

    @property
    def _announced(self) -> tuple[object, ...]:
        announced = self.announcement
        runtimes, offers = announced.models.runtimes, announced.models.offers
        return (
            announced.address,
            announced.key,
            announced.certificate,
            list(runtimes),
            list(runtimes.values()),
            list(announced.models.held),
            None if offers is None else sorted(offers),
        )

    def _sql(self, text: str, **parts: str) -> str:
        now = self._now()
        return text.format(now=now, **{name: part.format(now=now) for name, part in parts.items()})

    def _on_news(self, _: object, __: int, ___: str, goal: str) -> None:
        if goal:
            self.front.back(float(goal))
        if self.volunteers():
            self.news.set()
