"""Whole servers killed under load: `python -m tests.faults.fleet_chaos --kills 20 --jobs 200`.

Fake engines, real servers and a real PostgreSQL, all on one machine. A kill is SIGKILL, or SIGSTOP
until the lease has run out. Each kill takes a server that runs jobs; a new one takes its place. At
the end every accepted job has its image, equal to the one that another server makes alone, and none
ran more often than the kills that it met explain.
"""

import argparse
import asyncio
import hashlib
import random
import signal
import statistics
import sys
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from darkroom_client import AsyncClient, DarkroomError
from tests.faults.test_fleet_killed import rows
from tests.server.app.process import ServerProcess, start
from tools.postgres import cluster

SERVERS = 3
RESIDENT = 4
PASS_SECONDS = 0.05
STEPS = (4, 40)
JOBS_PER_SECOND = 2.0
SETTLE_SECONDS = 6.0
"""After the start of the database nobody is taken for dead for so long."""


@dataclass
class Report:
    """What happened: how long the first job of each victim waited until it ran again, by kind."""

    kills: Counter[str] = field(default_factory=Counter)
    victims: int = 0
    again: dict[str, list[float]] = field(default_factory=dict)
    ended: Counter[str] = field(default_factory=Counter)


class Fleet:
    """The servers that run; ``fronts`` are their clients by name."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.fronts: dict[str, AsyncClient] = {}
        self.frozen: list[ServerProcess] = []
        self._processes = ExitStack()
        self._running: dict[str, ServerProcess] = {}
        self._left: list[AsyncClient] = []
        self._serial = 0

    async def add(self) -> None:
        self._serial += 1
        name = f"s{self._serial}"
        process = self._processes.enter_context(
            start(
                *("--ledger", self.url, "--server-id", name),
                *("--max-resident-samples", str(RESIDENT), "--max-queued-jobs", "1000"),
                *("--log-format", "json", "--grace", "0"),
                pass_seconds=PASS_SECONDS,
            )
        )
        address = (await asyncio.to_thread(process.until, "serving"))["address"]
        self._running[name] = process
        self.fronts[name] = AsyncClient(address)

    async def kill(self, name: str, kind: str) -> None:
        process, client = self._running.pop(name), self.fronts.pop(name)
        process.send(signal.SIGKILL if kind == "SIGKILL" else signal.SIGSTOP)
        if kind == "SIGSTOP":
            self.frozen.append(process)
        # Its calls go on until their time limits, as those of a caller do.
        self._left.append(client)

    def thaw(self) -> None:
        """Frozen servers go on, and learn that their jobs are others' by now."""
        for process in self.frozen:
            process.send(signal.SIGCONT)

    async def close(self) -> None:
        for client in (*self._left, *self.fronts.values()):
            await client.close()
        self._processes.close()


async def owned(url: str) -> dict[str, list[str]]:
    """The running jobs by the name of their server."""
    found = await rows(
        url,
        "SELECT servers.name, request_id FROM jobs JOIN servers ON servers.id = owner "
        "WHERE state = 1",
    )
    by_name: dict[str, list[str]] = {}
    for row in found:
        by_name.setdefault(row["name"], []).append(row["request_id"])
    return by_name


def steps(number: int) -> int:
    """Short and long jobs in turn."""
    return STEPS[0] + number % (STEPS[1] - STEPS[0])


async def submit(fleet: Fleet, number: int, dice: random.Random) -> None:
    """As a caller whose server dies does: the same id at another one."""
    while True:
        client = dice.choice(list(fleet.fronts.values()))
        try:
            await client.submit(
                f"star {number}",
                request_id=f"job-{number}",
                seed=number,
                steps=steps(number),
                timeout=3,
            )
            return
        except (DarkroomError, OSError):
            await asyncio.sleep(0.05)


async def result(fleet: Fleet, number: int) -> Any:
    while True:
        client = random.choice(list(fleet.fronts.values()))
        with suppress(DarkroomError):
            return await client.result(f"job-{number}", 120)
        await asyncio.sleep(0.05)


async def chaos(kills: int, jobs: int, seed: int) -> int:
    dice, report = random.Random(seed), Report()
    with cluster() as database:
        began = time.monotonic()
        fleet = Fleet(database.url)
        try:
            await asyncio.gather(*(fleet.add() for _ in range(SERVERS)))
            await asyncio.sleep(max(0.0, SETTLE_SECONDS - (time.monotonic() - began)))
            over = asyncio.Event()
            feeding = asyncio.create_task(feed(fleet, jobs, dice, over))
            await harass(fleet, kills, dice, report)
            over.set()
            jobs = await feeding
            images = await asyncio.gather(*(result(fleet, n) for n in range(jobs)))
            fleet.thaw()
            return await judge(fleet, images, jobs, report)
        finally:
            fleet.thaw()
            await fleet.close()


async def feed(fleet: Fleet, jobs: int, dice: random.Random, over: asyncio.Event) -> int:
    """Submit jobs as long as servers are killed, and at least ``jobs``; returns how many."""
    number = 0
    while number < jobs or not over.is_set():
        await submit(fleet, number, dice)
        number += 1
        await asyncio.sleep(dice.expovariate(JOBS_PER_SECOND))
    return number


async def harass(fleet: Fleet, kills: int, dice: random.Random, report: Report) -> None:
    for number in range(kills):
        kind = "SIGKILL" if number % 2 == 0 else "SIGSTOP"
        by_name: dict[str, list[str]] = {}
        while not (names := [name for name in fleet.fronts if by_name.get(name)]):
            by_name = await owned(fleet.url)
            await asyncio.sleep(0.01)
        name = dice.choice(names)
        victims = by_name[name]
        report.kills[kind] += 1
        report.victims += len(victims)
        at = time.monotonic()
        await fleet.kill(name, kind)
        ended = asyncio.create_task(again(fleet.url, name, victims))
        await fleet.add()
        if (seconds := await ended) is not None:
            report.again.setdefault(kind, []).append(seconds)
        print(
            f"kill {number + 1}: {kind} of {name} with {len(victims)} jobs, "
            f"taken over after {time.monotonic() - at if seconds is None else seconds:.2f} s",
            flush=True,
        )


async def again(url: str, name: str, victims: list[str]) -> float | None:
    """Seconds until another server has one of ``victims``, or all have ended; None for those."""
    began = time.monotonic()
    connection = await asyncpg.connect(url, server_settings={"search_path": "darkroom"})
    try:
        while True:
            found = await connection.fetch(
                "SELECT state, losses, servers.name FROM jobs LEFT JOIN servers "
                "ON servers.id = owner WHERE request_id = ANY ($1)",
                victims,
            )
            if any(
                row["losses"] and row["state"] in (1, 2) for row in found if row["name"] != name
            ):
                return time.monotonic() - began
            if all(row["state"] == 2 for row in found):
                return None
            await asyncio.sleep(0.01)
    finally:
        await connection.close()


async def judge(fleet: Fleet, images: list[Any], jobs: int, report: Report) -> int:
    """Print what was found; the exit code."""
    client = next(iter(fleet.fronts.values()))
    places = asyncio.Semaphore(RESIDENT)

    async def is_wrong(number: int) -> bool:
        async with places:
            fresh = await client.generate(f"star {number}", seed=number, steps=steps(number))
        return digest(images[number]) != digest(fresh)

    checks = await asyncio.gather(*(is_wrong(number) for number in range(jobs)))
    wrong = [number for number, each in enumerate(checks) if each]
    left = await rows(fleet.url, "SELECT state, losses, epoch FROM jobs")
    states, losses = Counter(r["state"] for r in left), Counter(r["losses"] for r in left)
    for kind, seconds in report.again.items():
        print(
            f"{kind}: a victim ran elsewhere after {statistics.median(seconds):.2f} s (median), "
            f"{max(seconds):.2f} s at most, of {len(seconds)}"
        )
    print(f"kills: {dict(report.kills)}, {report.victims} jobs in the killed servers")
    print(f"{jobs} jobs, states {dict(states)}, losses {dict(losses)}, {len(wrong)} wrong images")
    nothing_lost = len(images) == jobs and not wrong and states == {2: jobs}
    print("nothing was lost" if nothing_lost else "SOMETHING WAS LOST")
    return 0 if nothing_lost else 1


def digest(generation: Any) -> str:
    return hashlib.sha256(generation.image.data).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    return asyncio.run(chaos(given.kills, given.jobs, given.seed))


if __name__ == "__main__":
    sys.exit(main())
