"""How a PostgreSQL ledger accepts a job: its id, its quota and its place in one transaction."""

from collections.abc import Callable
from typing import Any

import asyncpg

from darkroom_server.core.errors import RequestConflict
from darkroom_server.core.ledger import Begun, Draft, Standing
from darkroom_server.ledger.input_limits import InputLimits
from darkroom_server.ledger.postgres.front import LATEST
from darkroom_server.ledger.postgres.inputs import add_inputs, make_room
from darkroom_server.ledger.postgres.rows import KEY, columns, entry_of
from darkroom_server.ledger.postgres.session import CHANNEL
from darkroom_server.ledger.rows import runtime_of
from darkroom_server.ledger.rules import queue_is_full, too_many_jobs

QUOTA_LOCK = 0x4453
"""The first number of the advisory locks of callers with a quota."""

INSERT = """
    INSERT INTO jobs (caller, request_id, fingerprint, record, model, counted_as, detached, goal,
        accepted_at, queued_at, deadline, state, owner, epoch, runtime, needs, calls_at)
    SELECT $1::text, $2::text, $3::bytea, $4::bytea, $5::text, $6::text, $7::boolean,
        greatest(at + $8::float8, {now} - {latest}), at, at + $13::float8, at + $9::float8,
        $10::smallint, $11::bigint, $12::int, $14::text, $15::text[], $16::bigint
    FROM (SELECT {now} - $13::float8 AS at) AS accepted
    ON CONFLICT (caller, request_id) DO NOTHING RETURNING {columns}
"""

NOTIFY = """
    (SELECT pg_notify($17, '')
        WHERE NOT EXISTS (SELECT 1 FROM jobs WHERE state = 0 AND goal >= $18))
"""
"""Does not see the row that the statement inserts."""

EXTEND = """
    UPDATE jobs SET detached = detached OR $3, extended = extended OR (state = 1 AND owner <> $4),
        calls_at = CASE WHEN $5 AND calls_at = $4 THEN calls_at END,
        deadline = CASE WHEN deadline IS NOT NULL AND $2::float8 IS NOT NULL
            THEN greatest(deadline, {now} + $2::float8) END
    WHERE id = $1 RETURNING {columns}
"""


async def accept(
    db: asyncpg.Connection,
    draft: Draft,
    *,
    me: int,
    claimed: bool,
    front: float,
    limits: InputLimits,
    now: Callable[[], str],
) -> Begun:
    """As ``Ledger.begin``, for the server ``me``.

    ``front``: the goal at which the queue begins. ``now``: SQL for the time in seconds.
    """
    if draft.max_live is None and not draft.inputs and (claimed or draft.max_queued is None):
        row = await _insert(db, draft, me, claimed, 1, front, now())  # One statement, one commit.
        if row is not None:
            return Begun(entry_of(row), new=True)
    while True:
        async with db.transaction():
            if draft.max_live is not None:
                await db.execute(
                    "SELECT pg_advisory_xact_lock($1, hashtext($2))", QUOTA_LOCK, draft.counted_as
                )
            old = await db.fetchrow(
                f"SELECT {columns(now())} FROM jobs WHERE {KEY} FOR UPDATE", *draft.key
            )
            if old is not None:
                if old["fingerprint"] != draft.fingerprint:
                    raise RequestConflict(draft.key.request_id)
                if old["state"] < Standing.FINISHED:
                    was_plain = old["calls_at"] is not None
                    old = await _extend(db, old["id"], draft, me, now())
                    if was_plain and old["calls_at"] is None and draft.inputs:
                        # From now on any server may have to run it.
                        await make_room(db, draft, limits)
                        await add_inputs(db, old["id"], draft)
                if old["state"] <= Standing.FINISHED:
                    return Begun(entry_of(old), new=False)
            await _check(db, draft, claimed, front)
            if draft.inputs:
                await make_room(db, draft, limits)
            if old is not None:
                await db.execute("DELETE FROM jobs WHERE id = $1", old["id"])
            epoch = 1 if old is None else old["epoch"] + 1
            row = await _insert(db, draft, me, claimed, epoch, front, now())
            if row is not None:
                await add_inputs(db, row["id"], draft)
                return Begun(entry_of(row), new=True)
            # Another server inserted it meanwhile.


async def _check(db: asyncpg.Connection, draft: Draft, claimed: bool, front: float) -> None:
    """Raise ``QuotaExceeded`` or ``QueueFull`` if the draft has no place."""
    if draft.max_queued is not None and not claimed:
        queued = await db.fetchval(
            "SELECT count(*) FROM jobs WHERE state = 0 AND goal >= $1", front
        )
        if queued >= draft.max_queued:
            raise queue_is_full(queued)
    if draft.max_live is not None:
        live = await db.fetchval(
            "SELECT count(*) FROM jobs WHERE counted_as = $1 AND state < 2", draft.counted_as
        )
        if live >= draft.max_live:
            raise too_many_jobs(draft, live)


async def _extend(db: asyncpg.Connection, job: int, draft: Draft, me: int, now: str) -> Any:
    """Give a job the later deadline of two; its owner reads that with its next beat."""
    seconds = None if draft.deadline is None else draft.deadline - draft.age
    statement = EXTEND.format(now=now, columns=columns(now))
    return await db.fetchrow(statement, job, seconds, draft.detached, me, draft.plain)


async def _insert(
    db: asyncpg.Connection,
    draft: Draft,
    me: int,
    claimed: bool,
    epoch: int,
    front: float,
    now: str,
) -> Any:
    """The new row; None if there is one of that key."""
    statement = INSERT.format(now=now, columns=columns(now), latest=LATEST)
    return await db.fetchrow(
        statement if claimed else f"{statement}, {NOTIFY}",
        *draft.key,
        draft.fingerprint,
        draft.record,
        draft.model,
        draft.counted_as,
        draft.detached,
        draft.goal,
        draft.deadline,
        Standing.CLAIMED if claimed else Standing.QUEUED,
        me if claimed else None,
        epoch,
        draft.age,
        runtime_of(draft, claimed=claimed),
        sorted(draft.needs),
        me if draft.plain else None,
        *(() if claimed else (CHANNEL, front)),
    )
