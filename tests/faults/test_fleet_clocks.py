"""A fleet in which the clock of one server is wrong: deadlines and ages hold all the same."""

import asyncio
import json
from contextlib import AsyncExitStack, ExitStack
from datetime import datetime
from pathlib import Path

import pytest

from darkroom_client import AsyncClient, DeadlineExceeded, JobState
from tests.faults.test_fleet_killed import RESIDENT, flags, rows
from tests.server.app.process import ServerProcess, start
from tools.postgres import Cluster, emptied

PASS_SECONDS = 0.02
LONG_STEPS = 150
EARLY_STEPS = 250
"""Enough that the server with room first does not take all of these jobs."""

HOUR = 3600

LIBRARY = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


def address(server: ServerProcess) -> str:
    found: str = server.until("serving")["address"]
    return found


def clock_of(server: ServerProcess) -> datetime:
    """When the server wrote the last line of its log that was read."""
    return datetime.fromisoformat(json.loads(server.lines[-1])["timestamp"])


@pytest.mark.needs("postgresql", "faketime")
@pytest.mark.parametrize("seconds", [HOUR, -HOUR])
async def test_deadlines_hold_although_a_clock_is_an_hour_off(
    postgresql: Cluster, seconds: int
) -> None:
    url = postgresql.url
    await emptied(url)
    wrong = {
        "LD_PRELOAD": str(LIBRARY),
        "FAKETIME": f"{seconds:+d}s",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    with ExitStack() as processes:
        off, right = [
            processes.enter_context(
                start(
                    *(*flags(url, name), "--no-early-refusal"), env=env, pass_seconds=PASS_SECONDS
                )
            )
            for name, env in (("off", wrong), ("right", {}))
        ]
        addresses = [address(each) for each in (off, right)]
        apart = (clock_of(off) - clock_of(right)).total_seconds()
        assert apart == pytest.approx(seconds, abs=60)
        async with AsyncExitStack() as clients:
            fronts = [await clients.enter_async_context(AsyncClient(each)) for each in addresses]
            # Both are full, so the others wait in the ledger.
            for number in range(2 * RESIDENT):
                await fronts[number % 2].submit(
                    "a star", request_id=f"long-{number}", steps=LONG_STEPS, time_limit=120
                )
            while len(await rows(url, "SELECT 1 FROM jobs WHERE state = 1")) < 2 * RESIDENT:
                pass
            for number, front in enumerate(fronts):
                await front.submit("a star", request_id=f"late-{number}", time_limit=0.5)
                for each in range(4):
                    await front.submit(
                        "a star",
                        request_id=f"early-{number}-{each}",
                        steps=EARLY_STEPS,
                        time_limit=120,
                    )
            # Any server answers for any job: each is asked at the other one.
            for number, front in enumerate(reversed(fronts)):
                with pytest.raises(DeadlineExceeded):
                    await front.result(f"late-{number}", 60)
                waiting = await front.job(f"early-{number}-0")
                assert waiting.age < 60
            await asyncio.gather(
                *(
                    front.result(f"early-{number}-{each}", 60)
                    for number, front in enumerate(reversed(fronts))
                    for each in range(4)
                ),
                *(fronts[0].result(f"long-{number}", 60) for number in range(2 * RESIDENT)),
            )
            assert {(await front.job("long-0")).state for front in fronts} == {JobState.FINISHED}
            claimed = await rows(
                url, "SELECT DISTINCT owner FROM jobs WHERE request_id LIKE 'early%'"
            )
            assert len(claimed) == 2  # Both claimed jobs, the one with the wrong clock too.
