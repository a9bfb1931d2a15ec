"""The pictures of jobs in an SQLite ledger: each file once, within limits on their bytes."""

import sqlite3

from darkroom_server.core.ledger import Draft, Key
from darkroom_server.ledger.input_limits import InputLimits, Named, evicted


def make_room(db: sqlite3.Connection, draft: Draft, limits: InputLimits) -> None:
    """Delete the oldest ended jobs with inputs until those of ``draft`` fit into ``limits``.

    Raises what ``evicted`` raises, before anything is deleted.
    """
    rows = db.execute(
        "SELECT job, counted_as, state >= 2, digest, bytes FROM job_inputs "
        "JOIN jobs ON jobs.id = job JOIN inputs USING (digest) ORDER BY ended_at, job"
    )
    for job in evicted(draft, [Named(*row) for row in rows], limits):
        db.execute("DELETE FROM jobs WHERE id = ?", (job,))


def add_inputs(db: sqlite3.Connection, job: int | None, draft: Draft) -> None:
    """Store the inputs of ``draft`` for the row ``job``."""
    for digest, data in draft.inputs.items():
        db.execute(
            "INSERT OR IGNORE INTO inputs (digest, bytes, data) VALUES (?, ?, ?)",
            (digest, len(data), data),
        )
        db.execute("INSERT INTO job_inputs (job, digest) VALUES (?, ?)", (job, digest))


def drop_inputs(db: sqlite3.Connection, key: Key) -> None:
    """A job that ended without its images never runs from this entry again."""
    db.execute(
        "DELETE FROM job_inputs WHERE job = "
        "(SELECT id FROM jobs WHERE caller = ? AND request_id = ?)",
        key,
    )
