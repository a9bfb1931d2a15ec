"""The rows of jobs in a PostgreSQL ledger, as entries."""

from typing import Any

from darkroom_server.core.ledger import Entry, Key, Standing
from darkroom_server.ledger.rules import failure_of

KEY = "caller = $1 AND request_id = $2"

NOW = "extract(epoch FROM clock_timestamp())::float8"
"""Seconds since the epoch, by the database's clock: those of servers differ."""


def columns(now: str) -> str:
    """What ``entry_of`` needs of a row of ``jobs``; ``now``: SQL for the time in seconds."""
    return f"jobs.*, {now} AS read_at"


def entry_of(row: Any) -> Entry:
    """A row with ``columns`` as an entry."""
    now = row["read_at"]
    return Entry(
        key=Key(row["caller"], row["request_id"]),
        standing=Standing(row["state"]),
        owner=row["owner"],
        epoch=row["epoch"],
        losses=row["losses"],
        fingerprint=row["fingerprint"],
        record=row["record"],
        model=row["model"],
        counted_as=row["counted_as"],
        detached=row["detached"],
        # The clock of the database's machine may be set back.
        age=max(0.0, now - row["accepted_at"]),
        goal=row["goal"] - now,
        remaining=None if row["deadline"] is None else row["deadline"] - now,
        ended_for=None if row["ended_at"] is None else max(0.0, now - row["ended_at"]),
        failure=failure_of(row["failure"]),
    )
