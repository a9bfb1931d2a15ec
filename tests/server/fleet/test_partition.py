"""A server that the network cuts off from the database, while its callers still reach it."""

import grpc
import pytest

from darkroom_server.settings import Storage
from tests.faults.partition import Link
from tests.server.fleet.conftest import Servers
from tests.server.fleet.test_fleet import LEDGER, images
from tests.server.streams import submit
from tests.server.wire import NOT_SERVING, SERVING, refusal
from tools.postgres import Cluster


@pytest.mark.needs("postgresql")
async def test_its_jobs_run_elsewhere_and_what_it_says_of_them_counts_no_more(
    postgresql: Cluster, servers: Servers
) -> None:
    link = await Link.to(postgresql.port)
    by_link = f"postgresql://postgres@127.0.0.1:{link.port}/postgres"
    a, b = await servers.start("a", storage=Storage(ledger=by_link)), await servers.start("b")
    await submit(a, request_id="job", seed=7, steps=5)
    await servers.becomes(lambda states: states == {"job": 1})
    a.engine.advance(2)
    link.cut()
    # The others take it for dead once its lease has run out, although its connection is open.
    assert (await b.submitted.get()).request_id == "job"
    error = await refusal(submit(a, request_id="new"))
    assert (error.code, error.info.reason) == (
        grpc.StatusCode.UNAVAILABLE,
        "LEDGER_UNREACHABLE",
    )
    assert await a.health() == SERVING
    assert await a.health(LEDGER) == NOT_SERVING
    expected = await images(b, "job", b)
    await servers.becomes(lambda states: states == {"job": 2})
    ended = await servers.sql("SELECT owner, epoch, losses, ended_at FROM jobs")
    assert [row["losses"] for row in ended] == [1]
    # It knows nothing of that, and its own callers get the same image.
    assert await images(a, "job", a) == expected
    link.heal()
    await a.health_becomes(SERVING, LEDGER)
    await servers.finds(2, "SELECT 1 FROM servers")
    await submit(a, request_id="new")
    await servers.becomes(lambda states: states.keys() == {"job", "new"})
    job = "SELECT owner, epoch, losses, ended_at FROM jobs WHERE request_id = 'job'"
    assert await servers.sql(job) == ended
    await link.close()
