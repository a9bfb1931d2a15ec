"""The pictures of jobs in an SQLite ledger: each file once, within a limit on all of them."""

import sqlite3

from darkroom_server.core.ledger import Draft, Key
from darkroom_server.ledger.rules import inputs_do_not_fit


def make_room(db: sqlite3.Connection, draft: Draft, max_bytes: int) -> None:
    """Delete the oldest ended jobs with inputs until those of ``draft`` fit into ``max_bytes``.

    Raises ``QueueFull`` before anything is deleted if they do not fit beside those of live jobs.
    """
    held, new = _sizes(db, draft)
    if held + new <= max_bytes:
        return
    live = dict(
        db.execute(
            "SELECT digest, bytes FROM inputs WHERE digest IN "
            "(SELECT digest FROM job_inputs JOIN jobs ON jobs.id = job WHERE state < 2)"
        ).fetchall()
    )
    needed = live | {digest: len(data) for digest, data in draft.inputs.items()}
    if sum(needed.values()) > max_bytes:
        raise inputs_do_not_fit(held, new, max_bytes)
    ended = db.execute(
        "SELECT id FROM jobs WHERE state >= 2 AND id IN (SELECT job FROM job_inputs) "
        "ORDER BY ended_at, id"
    ).fetchall()
    for (job,) in ended:
        db.execute("DELETE FROM jobs WHERE id = ?", (job,))
        if sum(_sizes(db, draft)) <= max_bytes:
            break


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


def _sizes(db: sqlite3.Connection, draft: Draft) -> tuple[int, int]:
    """The bytes of all inputs, and of those of ``draft`` that are not among them."""
    (held,) = db.execute("SELECT coalesce(sum(bytes), 0) FROM inputs").fetchone()
    new = sum(
        len(data)
        for digest, data in draft.inputs.items()
        if not db.execute("SELECT 1 FROM inputs WHERE digest = ?", (digest,)).fetchone()
    )
    return held, new
