"""The pictures of jobs in a PostgreSQL ledger: each file once, within limits on their bytes."""

import asyncpg

from darkroom_server.core.ledger import Draft
from darkroom_server.ledger.input_limits import InputLimits, Named, evicted

INPUTS_LOCK = 0x44524C32
"""Held by every transaction that adds or deletes files, so that no two disagree on which remain."""

UNNAMED = "NOT EXISTS (SELECT 1 FROM job_inputs WHERE job_inputs.digest = inputs.digest)"


async def make_room(db: asyncpg.Connection, draft: Draft, limits: InputLimits) -> None:
    """Delete the oldest ended jobs with inputs until those of ``draft`` fit into ``limits``.

    Raises what ``evicted`` raises, before anything is deleted.
    """
    await db.execute("SELECT pg_advisory_xact_lock($1)", INPUTS_LOCK)
    rows = await db.fetch(
        "SELECT job, counted_as, state >= 2, digest, bytes FROM job_inputs "
        "JOIN jobs ON jobs.id = job JOIN inputs USING (digest) ORDER BY ended_at, job"
    )
    if jobs := evicted(draft, [Named(*row) for row in rows], limits):
        await db.execute("DELETE FROM jobs WHERE id = ANY ($1)", jobs)


async def add_inputs(db: asyncpg.Connection, job: int, draft: Draft) -> None:
    """Store the inputs of ``draft`` for the row ``job``; after ``make_room``."""
    for digest, data in draft.inputs.items():
        await db.execute(
            "INSERT INTO inputs (digest, bytes, data) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
            digest,
            len(data),
            data,
        )
        await db.execute(
            "INSERT INTO job_inputs (job, digest) VALUES ($1, $2) ON CONFLICT DO NOTHING",
            job,
            digest,
        )


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
