"""What `make fleet` runs: three servers on one ledger in PostgreSQL, a load, and one SIGKILL.

All on this machine, with the demo model. Every accepted job must have its image, and each image
must have the bytes that a server generates for the same `exact` request without a ledger.
"""

import argparse
import asyncio
import os
import signal
import sys
import time
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace

import asyncpg

from darkroom_client import AsyncClient, GenerationRequest, GenerationResult
from tools.lifetime import exit_on_sigterm
from tools.observe.server import Running, server
from tools.postgres import cluster

SERVERS = 3
RESIDENT = 3
"""Images in an engine at once: few, so that jobs wait in the ledger."""

SETTLE_SECONDS = 6.0
"""After its start the database's servers may have lost their connections, so none is dead yet."""

RESULT_SECONDS = 300.0


def main() -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=24)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    exit_on_sigterm()
    with cluster() as database, ExitStack() as processes:
        began = time.monotonic()
        print(f"PostgreSQL runs: {database.url}")
        flags = ("--ledger", database.url, "--max-resident-samples", str(RESIDENT))
        running = [processes.enter_context(server(*flags)) for _ in range(SERVERS)]
        print(f"{SERVERS} servers with the demo model serve: {[each.address for each in running]}")
        time.sleep(max(0.0, SETTLE_SECONDS - (time.monotonic() - began)))
        return asyncio.run(load(database.url, running, given.jobs, given.steps))


async def load(url: str, running: list[Running], jobs: int, steps: int) -> int:
    """Submit ``jobs`` to all servers in turn, kill the first, and compare every image."""
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(AsyncClient(each.address)) for each in running]
        database = await asyncpg.connect(url, server_settings={"search_path": "darkroom"})
        stack.push_async_callback(database.close)
        requests = [
            GenerationRequest(f"a red circle {number}", seed=number, steps=steps, exact=True)
            for number in range(jobs)
        ]
        for number, each in enumerate(requests):
            client = clients[number % len(clients)]
            await client.submit(replace(each, request_id=f"job-{number}"))
        print(f"{jobs} jobs are accepted; {await waiting(database)} of them wait in the ledger")
        owner, address = await database.fetchrow("SELECT id, address FROM servers ORDER BY id")
        victim = next(each for each in running if each.address == address)
        had = await database.fetchval(
            "SELECT count(*) FROM jobs WHERE owner = $1 AND state = 1", owner
        )
        os.kill(victim.pid, signal.SIGKILL)
        print(f"the server {victim.address} is killed by SIGKILL, with {had} jobs in its engine")
        living = [c for c, each in zip(clients, running, strict=True) if each is not victim]
        found = await asyncio.gather(
            *(
                living[number % len(living)].result(f"job-{number}", RESULT_SECONDS)
                for number in range(jobs)
            )
        )
        again = await database.fetchval("SELECT count(*) FROM jobs WHERE losses > 0")
        print(f"every job has ended; {again} ran a second time, at another server")
        wrong = 0
        for result, each in zip(found, requests, strict=True):
            fresh = await living[0].generate(each)
            wrong += not same(result, fresh)
        if wrong or not again:
            print(f"SOMETHING WAS LOST: {wrong} images differ, and {again} jobs ran again")
            return 1
        print(f"nothing was lost: {jobs} images of {jobs}, each with the bytes of a lone server")
        return 0


async def waiting(database: asyncpg.Connection) -> int:
    """How many jobs wait in the ledger."""
    count: int = await database.fetchval("SELECT count(*) FROM jobs WHERE state = 0")
    return count


def same(one: GenerationResult, other: GenerationResult) -> bool:
    """Whether two results have the same bytes."""
    return [image.data for image in one.images] == [image.data for image in other.images]


if __name__ == "__main__":
    sys.exit(main())
