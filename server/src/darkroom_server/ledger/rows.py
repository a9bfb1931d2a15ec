"""The rows of jobs in a database, as entries."""

from collections.abc import Iterable
from typing import Any

from darkroom_server.core.ledger import Draft, Entry, Key, Standing
from darkroom_server.ledger.rules import failure_of


def entry_of(row: Any, now: float, needs: Iterable[str], *, calls_at: int | None = None) -> Entry:
    """A row of ``jobs`` as an entry; ``now``: when it was read, by the clock of its times.

    ``needs``: those of the row, which databases store in different ways. ``calls_at``: its own, in
    a ledger that is shared.
    """
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
        detached=bool(row["detached"]),
        # The clock of a machine may be set back.
        age=max(0.0, now - row["accepted_at"]),
        goal=row["goal"] - now,
        remaining=None if row["deadline"] is None else row["deadline"] - now,
        ended_for=None if row["ended_at"] is None else max(0.0, now - row["ended_at"]),
        failure=failure_of(row["failure"]),
        runtime=row["runtime"],
        needs=frozenset(needs),
        calls_at=calls_at,
    )


def runtime_of(draft: Draft, *, claimed: bool) -> str | None:
    """The runtime of a new row: a queued ``exact`` job has none yet."""
    return draft.runtime if claimed or draft.runtime is None else ""
