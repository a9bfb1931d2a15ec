"""Which queued jobs a server of a PostgreSQL ledger may claim, and which nobody can."""

from typing import Any

from darkroom_server.core.ledger import Key, Models
from darkroom_server.ledger.postgres.rows import columns

CLAIM = """
    WITH chosen AS (
        SELECT id FROM jobs WHERE {conditions} ORDER BY goal, id LIMIT $1 FOR UPDATE SKIP LOCKED
    )
    UPDATE jobs SET state = 1, owner = $2, epoch = epoch + 1, extended = false{runtime}
    FROM chosen WHERE jobs.id = chosen.id RETURNING {columns}
"""

HERE = "(${runtimes}::text[])[array_position(${models}::text[], jobs.model)]"
"""The runtime that a job would have at this server."""

FITTING = """
    model = ANY (${models}::text[])
    AND (coalesce(runtime, '') = '' OR runtime = {here})
    AND (${offers}::text[] IS NULL OR needs <@ ${offers}::text[])
    AND (model = ANY (${held}::text[]) OR queued_at <= {now} - ${delay}::float8
        OR NOT EXISTS (SELECT 1 FROM servers WHERE jobs.model = ANY (servers.held)
            AND (servers.offers IS NULL OR jobs.needs <@ servers.offers)))
"""

UNSERVED = """
    SELECT id FROM jobs WHERE state = 0 AND goal >= $5 AND queued_at < {now} - $4 AND NOT EXISTS (
        SELECT 1 FROM servers, unnest(servers.models, servers.runtimes) AS offer (model, runtime)
        WHERE offer.model = jobs.model
        AND (coalesce(jobs.runtime, '') = '' OR offer.runtime = jobs.runtime)
        AND (servers.offers IS NULL OR jobs.needs <@ servers.offers))
    LIMIT $3 FOR UPDATE SKIP LOCKED
"""
"""Jobs that no server can run, after $4 seconds.

A server of schema 1 has no ``runtimes``, and what one of schema 2 offers is not known.
"""


def claiming(
    room: int,
    me: int,
    models: Models | None,
    key: Key | None,
    delay: float,
    *,
    front: float,
    now: str,
) -> tuple[str, list[Any]]:
    """The statement of ``Ledger.claim`` and its values, for the server ``me``.

    ``front``: the goal at which the queue begins. ``now``: SQL for the time in seconds.
    """
    values: list[Any] = [room, me]
    runtime = ""
    if key is None:
        conditions = ["state = 0 AND goal >= $3"]
        values.append(front)
    else:
        conditions = ["state = 0 AND caller = $3 AND request_id = $4"]
        values += key
    if models is not None:
        runtimes, first = models.runtimes, len(values) + 1
        offers = None if models.offers is None else sorted(models.offers)
        values += [list(runtimes), list(runtimes.values()), list(models.held), delay, offers]
        names = ("models", "runtimes", "held", "delay", "offers")
        places = {name: place for place, name in enumerate(names, first)}
        here = HERE.format(**places)
        conditions.append(FITTING.format(**places, here=here, now=now))
        runtime = f", runtime = CASE WHEN jobs.runtime = '' THEN {here} ELSE jobs.runtime END"
    statement = CLAIM.format(
        conditions=" AND ".join(conditions), runtime=runtime, columns=columns(now)
    )
    return statement, values
