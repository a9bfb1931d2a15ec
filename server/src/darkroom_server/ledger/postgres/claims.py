"""Queued jobs of a PostgreSQL ledger: which a server may claim, which are late, which unserved."""

from typing import Any

from darkroom_server.core.ledger import Key, Models, Standing
from darkroom_server.ledger.postgres.rows import columns
from darkroom_server.ledger.rules import EXPIRED_AT_ONCE, LATE, failure_text

CLAIM = """
    WITH chosen AS (
        SELECT id FROM jobs WHERE {conditions} ORDER BY goal, id LIMIT $1 FOR UPDATE SKIP LOCKED
    )
    UPDATE jobs SET state = 1, owner = $2, epoch = epoch + 1, extended = false{runtime}
    FROM chosen WHERE jobs.id = chosen.id RETURNING {columns}
"""

LATE_JOBS = """
    SELECT id FROM jobs WHERE state = 0 AND goal BETWEEN ${front} AND {at} AND deadline <= {at}
    LIMIT ${most} FOR UPDATE SKIP LOCKED
"""
"""The index of goals finds them, and stops at this moment: no deadline is before its goal."""

EXPIRE_AND_CLAIM = """
    WITH moment AS MATERIALIZED (SELECT {now} AS at),
    late AS ({late}),
    expired AS (
        UPDATE jobs SET state = ${state}, ended_at = {at}, failure = ${failure}
        WHERE id = ANY (ARRAY (TABLE late)) RETURNING jobs.*
    ),
    unused AS (DELETE FROM job_inputs WHERE job = ANY (ARRAY (SELECT id FROM expired))),
    claimed AS ({claim})
    SELECT *, {at} AS read_at FROM (TABLE claimed UNION ALL TABLE expired) AS jobs
"""
"""One statement and one commit. Its parts see the same jobs at the same moment, so none is in both;
files that no job names any more are deleted at a beat."""

AT = "(SELECT at FROM moment)"

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

    Without ``key`` it returns the jobs that ended as they were late, too. ``front``: the goal at
    which the queue begins. ``now``: SQL for the time in seconds.
    """
    values: list[Any] = [room, me]
    runtime = ""
    if key is None:
        conditions = [f"state = 0 AND goal >= $3 AND (deadline IS NULL OR deadline > {AT})"]
        values.append(front)
    else:
        conditions = ["state = 0 AND caller = $3 AND request_id = $4"]
        values += key
    if models is not None:
        runtimes = models.runtimes
        offers = None if models.offers is None else sorted(models.offers)
        places = _add(
            values,
            models=list(runtimes),
            runtimes=list(runtimes.values()),
            held=list(models.held),
            delay=delay,
            offers=offers,
        )
        here = HERE.format(**places)
        conditions.append(FITTING.format(**places, here=here, now=now))
        runtime = f", runtime = CASE WHEN jobs.runtime = '' THEN {here} ELSE jobs.runtime END"
    claim = CLAIM.format(
        conditions=" AND ".join(conditions),
        runtime=runtime,
        columns=columns(now) if key is not None else "jobs.*",
    )
    if key is not None:
        return claim, values
    places = _add(values, state=Standing.EXPIRED, failure=failure_text(LATE), most=EXPIRED_AT_ONCE)
    late = LATE_JOBS.format(front=3, at=AT, **places)
    return EXPIRE_AND_CLAIM.format(now=now, at=AT, late=late, claim=claim, **places), values


def _add(values: list[Any], **more: Any) -> dict[str, int]:
    """Add ``more`` to the values of a statement; returns the number of each."""
    first = len(values) + 1
    values += more.values()
    return {name: number for number, name in enumerate(more, first)}
