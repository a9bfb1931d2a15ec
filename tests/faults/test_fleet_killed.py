"""Servers that share a ledger: one is killed by SIGKILL, and the others finish all its jobs."""

import asyncio
import signal
from contextlib import AsyncExitStack, ExitStack
from typing import Any

import asyncpg
import pytest

from darkroom_client import AsyncClient
from tests.faults.test_ledger_killed import address, data, runs
from tests.server.app.process import ServerProcess, start
from tools.postgres import Cluster, emptied

JOBS = 24
STEPS = 60
PASS_SECONDS = 0.02
RESIDENT = 4


def flags(url: str, name: str) -> list[str]:
    room = ["--max-resident-samples", str(RESIDENT), "--max-queued-jobs", str(JOBS)]
    return ["--ledger", url, "--server-id", name, *room, "--log-format", "json"]


async def rows(url: str, statement: str, *values: Any) -> list[Any]:
    connection = await asyncpg.connect(url, server_settings={"search_path": "darkroom"})
    try:
        found: list[Any] = await connection.fetch(statement, *values)
        return found
    finally:
        await connection.close()


async def running(url: str, name: str) -> list[str]:
    """The jobs that the server ``name`` has."""
    found = await rows(
        url,
        "SELECT request_id FROM jobs JOIN servers ON servers.id = owner "
        "WHERE state = 1 AND servers.name = $1",
        name,
    )
    return [row["request_id"] for row in found]


@pytest.mark.needs("postgresql")
async def test_the_others_finish_what_a_killed_server_had(postgresql: Cluster) -> None:
    url = postgresql.url
    await emptied(url)
    names = ("a", "b", "c")
    with ExitStack() as processes:
        servers = [
            processes.enter_context(start(*flags(url, each), pass_seconds=PASS_SECONDS))
            for each in names
        ]
        async with AsyncExitStack() as clients:
            fronts = [
                await clients.enter_async_context(AsyncClient(address(each))) for each in servers
            ]
            ids = [f"job-{number}" for number in range(JOBS)]
            await asyncio.gather(
                *(
                    fronts[number % 3].submit(
                        f"star {number}", request_id=id, steps=STEPS, seed=number
                    )
                    for number, id in enumerate(ids)
                )
            )
            while len(victims := await running(url, "a")) < RESIDENT:
                pass
            servers[0].send(signal.SIGKILL)
            await asyncio.to_thread(servers[0].wait)
            # Half of them are watched at a server that never had them.
            results = await asyncio.gather(
                *(fronts[1 + number % 2].result(id, 60) for number, id in enumerate(ids))
            )
            fresh = await asyncio.gather(
                *(
                    fronts[2].generate(f"star {number}", steps=STEPS, seed=number)
                    for number in range(JOBS)
                )
            )
        for each in servers[1:]:
            each.send(signal.SIGTERM)
        for each in servers:
            each.wait()
            each.rest()
    assert [data(each.image) for each in results] == [data(each.image) for each in fresh]
    assert len({data(each.image) for each in results}) == JOBS
    counted = {id: runs(lines_of(servers), id) for id in ids}
    assert set(counted.values()) <= {1, 2}, counted
    survivors = lines_of(servers[1:])
    assert all(runs(survivors, id) == 1 for id in victims)
    left = await rows(url, "SELECT request_id, state, losses FROM jobs")
    lost = {row["request_id"] for row in left if row["losses"]}
    assert lost <= set(ids)
    assert lost
    assert {row["state"] for row in left} == {2}


def lines_of(servers: list[ServerProcess]) -> list[str]:
    return [line for each in servers for line in each.lines]
