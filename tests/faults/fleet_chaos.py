"""Whole servers lost under load: `python -m tests.faults.fleet_chaos --kills 20 --jobs 200`.

Fake engines, real servers and a real PostgreSQL, all on one machine. In turn a server that runs
jobs is killed by SIGKILL, frozen by SIGSTOP, or cut off from the database; a new one takes its
place. Callers submit jobs, and wait for each. In the end every accepted job has its image, equal to
the one that a lone server makes, and none ran more than twice. To see that, no server is taken away
while a job is in it that was lost before.

With ``--real`` the servers have the demo model, jobs are ``exact``, and images have equal bytes.
"""

import argparse
import asyncio
import hashlib
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg

from darkroom_client import AsyncClient, DarkroomError, UnknownRequest
from tests.faults.fleet_servers import KINDS, LoggedServer, ServerFleet
from tests.faults.test_fleet_killed import rows
from tools.lifetime import exit_on_sigterm
from tools.postgres import Cluster, cluster

SERVERS = 3
RESIDENT = 4
PASS_SECONDS = 0.05
SETTLE_SECONDS = 6.0
"""After the start of the database nobody is taken for dead for so long."""

CALL_SECONDS = 20.0
"""A caller whose server does not answer for so long asks another one."""

BACK_SECONDS = 30.0
"""Within which frozen servers are back after they were thawed."""

JUDGED_AT_ONCE = 50
JUDGE_SECONDS = 180.0
"""For one group of images."""

MAX_RUNS = 2


@dataclass(frozen=True, slots=True)
class Work:
    """What callers ask for, and how often a second. ``engine`` as of ``LoggedServer``."""

    jobs_per_second: float
    steps: tuple[int, int]
    exact: bool
    engine: dict[str, Any]

    def options(self, number: int) -> dict[str, Any]:
        """Those of a job: short and long ones in turn."""
        least, most = self.steps
        return {"seed": number, "steps": least + number % (most - least), "exact": self.exact}


FAKE = Work(2.0, (4, 40), False, {"pass_seconds": PASS_SECONDS})
REAL = Work(0.7, (4, 24), True, {"real": True})


@dataclass
class Report:
    """What happened. ``images``: the digest of each job's, by number.

    ``again``: how long the first job of each victim waited until it ran again, by kind.
    """

    kills: Counter[str] = field(default_factory=Counter)
    victims: int = 0
    again: dict[str, list[float]] = field(default_factory=dict)
    images: dict[int, str] = field(default_factory=dict)


def main() -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=20.0, help="the run fails after so long")
    parser.add_argument("--real", action="store_true", help="the demo model, not fake engines")
    given = parser.parse_args()
    exit_on_sigterm()
    work = REAL if given.real else FAKE
    return asyncio.run(chaos(work, given.kills, given.jobs, given.seed, given.minutes))


async def chaos(work: Work, kills: int, jobs: int, seed: int, minutes: float) -> int:
    """Run it; returns the exit code."""
    dice, report = random.Random(seed), Report()
    with cluster() as database, tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        fleet = ServerFleet(
            database,
            Path(folder),
            *("--max-resident-samples", str(RESIDENT), "--max-queued-jobs", "1000"),
            *("--grace", "0"),
            **work.engine,
        )
        try:
            async with asyncio.timeout(minutes * 60):
                await asyncio.gather(*(fleet.add() for _ in range(SERVERS)))
                await asyncio.sleep(max(0.0, SETTLE_SECONDS - (time.monotonic() - began)))
                over = asyncio.Event()
                async with asyncio.TaskGroup() as group:
                    callers = group.create_task(call(fleet, work, jobs, dice, over, report))
                    await lose(fleet, database, kills, dice, report)
                    over.set()
                jobs = callers.result()
                print(f"{jobs} jobs have their images, {passed(began)} s", flush=True)
                await come_back(fleet, database)
                print(f"frozen servers are back, {passed(began)} s", flush=True)
                fresh = await fresh_images(Path(folder), work, jobs, began)
                return await judge(fleet, database, fresh, report)
        except TimeoutError:
            missing = sorted(set(range(jobs)) - report.images.keys())
            print(f"NOT DONE after {minutes:g} minutes; without images: {missing}")
            return 1
        finally:
            fleet.thaw()
            await fleet.close()


# The callers.


async def call(
    fleet: ServerFleet,
    work: Work,
    jobs: int,
    dice: random.Random,
    over: asyncio.Event,
    report: Report,
) -> int:
    """Call as long as servers are lost, and at least ``jobs`` times; returns how often."""
    number = 0
    async with asyncio.TaskGroup() as group:
        while number < jobs or not over.is_set():
            group.create_task(call_once(fleet, work, number, report))
            number += 1
            await asyncio.sleep(dice.expovariate(work.jobs_per_second))
    return number


async def call_once(fleet: ServerFleet, work: Work, number: int, report: Report) -> None:
    """Get the image of a job; as a caller whose server dies does, at another one.

    Every third caller waits in the call that asks, the others submit first. Later ones look first
    whether the fleet has the job, because a server begins what it is asked for before it knows.
    """
    id, result, options = f"job-{number}", None, work.options(number)
    known = False
    while result is None:
        client = random.choice(list(fleet.fronts.values()))
        try:
            if not known and number % 3 == 0:
                result = await client.generate(
                    prompt(number), request_id=id, timeout=CALL_SECONDS, **options
                )
            else:
                if not known:
                    await client.submit(prompt(number), request_id=id, timeout=3, **options)
                result = await client.result(id, CALL_SECONDS)
        except UnknownRequest:
            known = False
        except (DarkroomError, OSError):
            known = True
        await asyncio.sleep(0.05)
    report.images[number] = digest(result)


def prompt(number: int) -> str:
    """That of a job."""
    return f"star {number}"


def digest(result: Any) -> str:
    """Of the image of a job."""
    return hashlib.sha256(result.image.data).hexdigest()


# The losses.


async def lose(
    fleet: ServerFleet, database: Cluster, kills: int, dice: random.Random, report: Report
) -> None:
    """Take servers away, one after the other; the next once a job of the last one runs again."""
    for number in range(kills):
        kind = KINDS[number % len(KINDS)]
        while not (running := await expendable(fleet, database, report)):
            await asyncio.sleep(0.01)
        name = dice.choice(sorted(running))
        victims = running[name]
        report.kills[kind] += 1
        report.victims += len(victims)
        fleet.take_away(name, kind)
        adding = asyncio.create_task(fleet.add())
        seconds = await again(database.url, name, victims)
        await adding
        if seconds is not None:
            report.again.setdefault(kind, []).append(seconds)
        after = "had ended before" if seconds is None else f"ran elsewhere after {seconds:.2f} s"
        print(f"{number + 1}: {kind} of {name} with {len(victims)} jobs, which {after}", flush=True)


async def expendable(fleet: ServerFleet, database: Cluster, report: Report) -> dict[str, list[str]]:
    """The jobs of each server that may be taken away: none of them has run elsewhere before.

    Empty while a job that has run waits, because any server may claim it at any moment.
    """
    runs = fleet.submitted()
    got = {f"job-{number}" for number in report.images}
    found = await rows(
        database.url,
        "SELECT request_id, state, servers.name FROM jobs LEFT JOIN servers ON servers.id = owner",
    )
    places = {row["request_id"]: (row["state"], row["name"]) for row in found}
    # A server that is cut off from the database may give a caller its image, and then the job runs
    # again all the same; and a job that has ended runs again if its image is lost with its server.
    over = {id for id in got if places.get(id, (0, None))[0] == 2}
    running: dict[str, list[str]] = {}
    tired: set[str] = set()
    for id in set().union(*runs.values()) - over:
        state, name = places.get(id, (0, None))
        if state == 0 or name not in fleet.fronts:
            return {}
        running.setdefault(name, []).append(id)
        if any(jobs[id] for other, jobs in runs.items() if other != name):
            tired.add(name)
    return {
        name: ids
        for name, ids in running.items()
        if name not in tired and any(places[id][0] == 1 for id in ids)
    }


async def again(url: str, name: str, victims: list[str]) -> float | None:
    """Seconds until another server has one of ``victims``; None if all have ended before."""
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


async def come_back(fleet: ServerFleet, database: Cluster) -> None:
    """Let the frozen servers go on, and wait until all are in the ledger again."""
    fleet.thaw()
    async with asyncio.timeout(BACK_SECONDS):
        living = 0
        while living < len(fleet.fronts) + fleet.frozen:
            living = (await rows(database.url, "SELECT count(*) FROM servers"))[0][0]
            await asyncio.sleep(0.1)


# The end.


async def fresh_images(folder: Path, work: Work, jobs: int, began: float) -> dict[int, str]:
    """The digest of each job's image as a lone server without a ledger generates it."""
    lone = LoggedServer(folder / "lone.log", **(work.engine if work.exact else {"auto": True}))
    try:
        await lone.serving()
        found: dict[int, str] = {}
        async with AsyncClient(lone.address) as client:

            async def generate(number: int) -> None:
                made = await client.generate(prompt(number), **work.options(number))
                found[number] = digest(made)

            for first in range(0, jobs, JUDGED_AT_ONCE):
                group = range(first, min(first + JUDGED_AT_ONCE, jobs))
                async with asyncio.timeout(JUDGE_SECONDS):
                    await asyncio.gather(*map(generate, group))
                print(f"{len(found)} of {jobs} images to compare, {passed(began)} s", flush=True)
        return found
    finally:
        lone.close()


async def judge(
    fleet: ServerFleet, database: Cluster, fresh: dict[int, str], report: Report
) -> int:
    """Print what was found; returns the exit code."""
    left = await rows(database.url, "SELECT state, losses FROM jobs")
    states, losses = Counter(r["state"] for r in left), Counter(r["losses"] for r in left)
    wrong = sorted(number for number in fresh if report.images.get(number) != fresh[number])
    counts = sum(fleet.submitted().values(), Counter[str]())
    runs = Counter(counts.values())
    for kind, seconds in report.again.items():
        print(
            f"{kind}: the first victim ran elsewhere after {statistics.median(seconds):.2f} s "
            f"(median), {max(seconds):.2f} s at most, of {len(seconds)}"
        )
    print(f"losses: {dict(report.kills)}, {report.victims} jobs in the servers that were lost")
    print(f"{len(fresh)} jobs, states {dict(states)}, losses {dict(losses)}, wrong images {wrong}")
    print(f"jobs by how often an engine got them: {dict(sorted(runs.items()))}")
    failed = {
        "images are missing, equal or wrong": wrong or len(set(fresh.values())) < len(fresh),
        "a job did not finish": states != {2: len(fresh)},
        f"a job ran more than {MAX_RUNS} times": max(runs) > MAX_RUNS,
        "no job ran again, so nothing was tested": sum(losses.keys()) == 0,
    }
    for what, so in failed.items():
        if so:
            print(f"FAILED: {what}")
    if not any(failed.values()):
        print("nothing was lost")
    return int(any(failed.values()))


def passed(began: float) -> str:
    """Seconds since ``began``."""
    return f"{time.monotonic() - began:.0f}"


if __name__ == "__main__":
    sys.exit(main())
