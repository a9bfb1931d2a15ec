"""A claim looks at few jobs to find those whose deadline has passed: an index leads it to them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from darkroom_server.core.ledger import Key, Models, Standing
from darkroom_server.ledger.postgres import PostgresLedger
from darkroom_server.ledger.postgres.claims import claiming
from darkroom_server.ledger.postgres.rows import NOW
from darkroom_server.ledger.sqlite import LATE_JOBS, SqliteLedger
from tests.server.ledger.conftest import draft
from tools.postgres import Cluster, emptied

DEMO = Models(held={"demo": "fast"})

FILL = f"""
    INSERT INTO jobs (caller, request_id, fingerprint, record, model, counted_as, detached, goal,
        accepted_at, queued_at, deadline, state, epoch)
    SELECT 'ada', $1::text || n, '', repeat('r', 400)::bytea, 'demo', 'ada', false,
        at + $2::float8, at, at, at + $3::float8, $4::smallint, 1
    FROM (SELECT n, {NOW} AS at FROM generate_series(1, $5::int) AS n) AS new
"""


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for each in plan.get("Plans", ()):
        yield from nodes(each)


def scans(plan: dict[str, Any]) -> dict[str, float]:
    """How the statement finds jobs: by index, or "Seq Scan"; and how many rows it looks at."""
    found: dict[str, float] = {}
    for node in nodes(plan):
        name = node.get("Index Name")
        if name is None and node.get("Relation Name") == "jobs" and "Scan" in node["Node Type"]:
            name = node["Node Type"]
        if name is not None and "Bitmap Heap" not in name:
            looked = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
            found[name] = found.get(name, 0) + looked * node["Actual Loops"]
    return found


@pytest.mark.needs("postgresql")
async def test_an_index_serves_a_claim_that_ends_late_jobs(postgresql: Cluster) -> None:
    await emptied(postgresql.url)
    ledger = PostgresLedger(postgresql.url, name="a", settle=0.0)
    await ledger.open()
    db = await asyncpg.connect(postgresql.url, server_settings={"search_path": "darkroom"})
    # Many jobs that wait with a deadline ahead, many that ended, and a few late ones.
    await db.execute(FILL, "ended", -60.0, -30.0, Standing.FINISHED, 5000)
    await db.execute(FILL, "waits", 60.0, 90.0, Standing.QUEUED, 2000)
    await db.execute(FILL, "late", -5.0, -3.0, Standing.QUEUED, 5)
    await db.execute("ANALYZE")
    statement, values = claiming(1, ledger.id, DEMO, None, 0.0, front=0.0, now=NOW)

    async def plan() -> dict[str, float]:
        explained = await db.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", *values)
        return scans(json.loads(explained)[0]["Plan"])

    transaction = db.transaction()
    await transaction.start()
    looked = await plan()
    states = await db.fetch("SELECT state, count(*) FROM jobs GROUP BY state")
    assert dict(map(tuple, states)) == {
        Standing.FINISHED: 5000,
        Standing.QUEUED: 1999,
        Standing.CLAIMED: 1,
        Standing.EXPIRED: 5,
    }
    await transaction.rollback()
    assert looked.keys() <= {"jobs_queued", "jobs_pkey", "job_inputs_pkey", "servers_pkey"}
    # The late ones twice, to end them and to claim none of them, and the one that is claimed.
    assert looked["jobs_queued"] <= 20
    await db.execute("DROP INDEX jobs_queued")
    looked = await plan()
    assert max(looked.values()) > 1000, "what is compared does see a scan of all jobs"
    await db.close()
    await ledger.close()


async def test_an_index_finds_late_jobs_in_a_file(tmp_path: Path) -> None:
    ledger = SqliteLedger(tmp_path / "jobs.db")
    await ledger.open()
    await ledger.begin(draft(), claimed=False)

    async def plan(comment: str) -> list[str]:
        # An explanation that was prepared is not made again; another comment is another statement.
        statement = f"EXPLAIN QUERY PLAN {LATE_JOBS} -- {comment}"
        return await ledger._run(
            lambda db: [row["detail"] for row in db.execute(statement, (0, 0, 1))]
        )

    by_index = ["SEARCH jobs USING INDEX jobs_queued (goal<?)"]
    assert await plan("with it") == by_index
    await ledger._run(lambda db: db.execute("DROP INDEX jobs_queued"))
    assert await plan("without it") == ["SCAN jobs"]
    found = await ledger.find(Key("ada", "job"))
    assert found is not None
    assert found.standing is Standing.QUEUED
    await ledger.close()
