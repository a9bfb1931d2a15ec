"""The rows of jobs in a PostgreSQL ledger, as entries."""

from typing import Any

from darkroom_server.core.ledger import Entry
from darkroom_server.ledger import rows

KEY = "caller = $1 AND request_id = $2"

NOW = "extract(epoch FROM clock_timestamp())::float8"
"""Seconds since the epoch, by the database's clock: those of servers differ."""


def columns(now: str) -> str:
    """What ``entry_of`` needs of a row of ``jobs``; ``now``: SQL for the time in seconds."""
    return f"jobs.*, {now} AS read_at"


def entry_of(row: Any) -> Entry:
    """A row with ``columns`` as an entry."""
    return rows.entry_of(row, row["read_at"], row["needs"], calls_at=row["calls_at"])
