"""The pictures of jobs in a PostgreSQL ledger: each file once, within a limit on all of them."""

import asyncpg

from darkroom_server.core.ledger import Draft
from darkroom_server.ledger.rules import inputs_do_not_fit

INPUTS_LOCK = 0x44524C32
"""Held by every transaction that adds or deletes files, so that no two disagree on which remain."""

UNNAMED = "NOT EXISTS (SELECT 1 FROM job_inputs WHERE job_inputs.digest = inputs.digest)"


async def make_room(db: asyncpg.Connection, draft: Draft, max_bytes: int) -> None:
    """Delete the oldest ended jobs with inputs until those of ``draft`` fit into ``max_bytes``.

    Raises ``QueueFull`` before anything is deleted if they do not fit beside those of live jobs.
    """
    await db.execute("SELECT pg_advisory_xact_lock($1)", INPUTS_LOCK)
    held, new = await _sizes(db, draft)
    if held + new <= max_bytes:
        return
    live = await db.fetch(
        "SELECT digest, bytes FROM inputs WHERE digest IN "
        "(SELECT digest FROM job_inputs JOIN jobs ON jobs.id = job WHERE state < 2)"
    )
    needed = {row["digest"]: row["bytes"] for row in live}
    needed |= {digest: len(data) for digest, data in draft.inputs.items()}
    if sum(needed.values()) > max_bytes:
        raise inputs_do_not_fit(held, new, max_bytes)
    ended = await db.fetch(
        "SELECT id FROM jobs WHERE state >= 2 AND id IN (SELECT job FROM job_inputs) "
        "ORDER BY ended_at, id"
    )
    for row in ended:
        await db.execute("DELETE FROM jobs WHERE id = $1", row["id"])
        if sum(await _sizes(db, draft)) <= max_bytes:
            break


async def add_inputs(db: asyncpg.Connection, job: int, draft: Draft) -> None:
    """Store the inputs of ``draft`` for the row ``job``; after ``make_room``."""
    for digest, data in draft.inputs.items():
        await db.execute(
            "INSERT INTO inputs (digest, bytes, data) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
            digest,
            len(data),
            data,
        )
        await db.execute("INSERT INTO job_inputs (job, digest) VALUES ($1, $2)", job, digest)


async def drop_inputs(db: asyncpg.Connection, job: int) -> None:
    """A job that ended without its images never runs from this entry again."""
    if await db.fetchval("DELETE FROM job_inputs WHERE job = $1 RETURNING true", job):
        await collect(db)


async def collect(db: asyncpg.Connection) -> None:
    """Delete the files that no job names."""
    if await db.fetchval(f"SELECT EXISTS (SELECT 1 FROM inputs WHERE {UNNAMED})"):
        async with db.transaction():
            await db.execute("SELECT pg_advisory_xact_lock($1)", INPUTS_LOCK)
            await db.execute(f"DELETE FROM inputs WHERE {UNNAMED}")


async def _sizes(db: asyncpg.Connection, draft: Draft) -> tuple[int, int]:
    """The bytes of all inputs that a job names, and of those of ``draft`` not among them."""
    rows = await db.fetch(f"SELECT digest, bytes FROM inputs WHERE NOT ({UNNAMED})")
    held = {row["digest"]: row["bytes"] for row in rows}
    new = sum(len(data) for digest, data in draft.inputs.items() if digest not in held)
    return sum(held.values()), new
