"""What a fleet costs its database: each operation, and what a fleet of a hundred servers asks.

The operations are measured on a PostgreSQL of its own, the CPU time of all its processes and the
statements that it logs. How many a second there are is simulated (``fleet_simulation``). A claim is
measured once more beside a transaction that stays open, after many jobs have come and gone.
"""

import argparse
import asyncio
import itertools
import os
import re
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import asyncpg

from bench.report.benchmark import Amount, Benchmark, Measurement
from bench.report.goals import Goal
from bench.report.markdown import goals_table, table
from bench.report.results import Results
from bench.report.statistics import bootstrap_median
from bench.serving.fleet_simulation import FleetSimulation, Plan
from darkroom_server.core.ledger import (
    LEASE_SECONDS,
    Announcement,
    Draft,
    Hold,
    Key,
    Models,
    Standing,
)
from darkroom_server.ledger.postgres import PostgresLedger
from tools.postgres import Cluster, cluster, emptied

MODELS = Models(held={"demo": "runtime"})
RECORD = b"r" * 400
"""About as long as a request with a prompt of a few words."""

LOADS = (0.5, 0.8, 0.95)
OPEN_SECONDS = 600.0
"""How long the transaction is open in which jobs come and go."""

GOAL_SECONDS = 10.0
"""Of a job of 40 steps."""

QUEUED = 20
"""Jobs that wait while a claim is measured."""

SLOWER = 5.0
"""The most that a claim may take beside the open transaction, in its quiet time."""

LOGGED = re.compile(rb"^darkroom s0 LOG:  (execute|statement)", re.MULTILINE)
TICK = 1 / os.sysconf("SC_CLK_TCK")


def draft(number: int) -> Draft:
    """A job."""
    return Draft(
        key=Key("caller", f"job-{number}"),
        fingerprint=b"f" * 32,
        record=RECORD,
        model="demo",
        counted_as="caller",
        goal=GOAL_SECONDS,
        detached=True,
    )


class Costs:
    """Measures operations of ``ledger``, one of several on ``database``."""

    def __init__(self, database: Cluster, ledger: PostgresLedger, times: int) -> None:
        self._database = database
        self._ledger = ledger
        self._times = times
        self._numbers = itertools.count()

    async def all(self) -> dict[str, dict[str, float]]:
        """By operation: ms that a caller waits, ms of the database's CPUs, and statements."""
        ledger, times = self._ledger, self._times
        keys = [draft(next(self._numbers)) for _ in range(times)]
        claimed: list[Hold] = []

        async def begin(number: int) -> None:
            claimed.append((await ledger.begin(keys[number], claimed=True)).entry.hold)

        async def claim(_: int) -> None:
            claimed.extend(entry.hold for entry in await ledger.claim(1, models=MODELS))

        async def end(_: int) -> None:
            assert await ledger.end(claimed.pop(0), Standing.FINISHED)

        found = {"begin": await self._measure(begin), "end": await self._measure(end)}
        keys[:] = [draft(next(self._numbers)) for _ in range(times)]
        found["queue"] = await self._measure(lambda n: ledger.begin(keys[n], claimed=False))
        found["find"] = await self._measure(lambda n: ledger.find(keys[n].key))
        found["claim"] = await self._measure(claim)
        assert len(claimed) == times
        found["empty claim"] = await self._measure(lambda _: ledger.claim(1, models=MODELS))
        while claimed:
            await end(0)
        found["servers"] = await self._measure(lambda _: ledger.servers())
        session = ledger._session

        async def reap(_: int) -> None:
            await session.reap()
            await session.expire()

        session.volunteers = lambda: False  # type: ignore[method-assign]
        found["beat"] = await self._measure(lambda _: ledger.beat())
        found["reap"] = await self._measure(reap)
        found["renew"] = await self._measure(lambda _: ledger.renew())
        return found

    async def _measure(self, operation: Callable[[int], Awaitable[Any]]) -> dict[str, float]:
        """The mean of all but the last times; the statements of the last."""
        before, began = self._cpu_seconds(), time.perf_counter()
        for number in range(self._times - 1):
            await operation(number)
        waited = (time.perf_counter() - began) / (self._times - 1)
        computed = (self._cpu_seconds() - before) / (self._times - 1)
        return {
            "wait": waited * 1000,
            "cpu": computed * 1000,
            "statements": await self._statements(lambda: operation(self._times - 1)),
        }

    def _cpu_seconds(self) -> float:
        """Of all processes of the database."""
        total = 0.0
        for pid in self._database.processes():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) * TICK
        return total

    async def _statements(self, operation: Callable[[], Awaitable[Any]]) -> int:
        log = self._database.folder / "log"
        await set_logging(self._database.url, "all")
        before = log.stat().st_size
        await operation()
        with log.open("rb") as lines:
            lines.seek(before)
            counted = len(LOGGED.findall(lines.read()))
        await set_logging(self._database.url, "none")
        return counted


async def set_logging(url: str, which: str) -> None:
    """Which statements the database logs, of every connection from now on."""
    connection = await asyncpg.connect(url)
    await connection.execute("ALTER SYSTEM SET log_line_prefix = '%a '")
    await connection.execute(f"ALTER SYSTEM SET log_statement = '{which}'")
    await connection.execute("SELECT pg_reload_conf()")
    await connection.close()
    await asyncio.sleep(0.5)  # Its processes read that when they get to it.


async def measure_operations(database: Cluster, servers: int, times: int) -> Any:
    """What each operation costs with ``servers`` in the ledger."""
    async with AsyncExitStack() as stack:
        ledgers = []
        for number in range(servers):
            ledger = PostgresLedger(database.url, name=f"s{number}", retention=300.0, settle=0.0)
            ledger.announce(Announcement(address=f"s{number}:1", key="k" * 43, models=MODELS))
            await ledger.open()
            stack.push_async_callback(ledger.close)
            ledgers.append(ledger)
        beating = asyncio.create_task(keep_alive(ledgers[1:]))
        try:
            return await Costs(database, ledgers[0], times).all()
        finally:
            beating.cancel()


async def keep_alive(ledgers: Sequence[PostgresLedger]) -> None:
    """Renew the leases of all, seldom: their work is not what is measured."""
    while True:
        await asyncio.sleep(LEASE_SECONDS / 2)
        for ledger in ledgers:
            await ledger._session.renew()


async def measure_claims(database: Cluster, ended: int, times: int) -> dict[str, list[float]]:
    """Seconds of each claim: in quiet, and beside a transaction older than ``ended`` jobs.

    There also as it would be if the search began at the beginning of the index.
    """
    await emptied(database.url)
    ledger = PostgresLedger(database.url, name="one", retention=1e6, settle=0.0)
    ledger.announce(Announcement(address="", key="", models=MODELS))
    await ledger.open()
    connection = await asyncpg.connect(database.url, server_settings={"search_path": "darkroom"})
    other = await asyncpg.connect(database.url)
    try:
        numbers = itertools.count()
        seconds = {"quiet": await claims(ledger, times, numbers)}
        holding = other.transaction(isolation="repeatable_read")
        await holding.start()
        await other.execute("SELECT count(*) FROM darkroom.jobs")  # Takes its snapshot.
        await come_and_go(connection, ended)
        await ledger.beat()
        seconds["beside"] = await claims(ledger, times, numbers)
        seconds["from the beginning"] = await claims(
            ledger, max(times // 20, 1), numbers, from_beginning=True
        )
        dead = await connection.fetchval("SELECT count(*) FROM jobs WHERE state >= 2")
        assert dead >= ended
        await holding.rollback()
        return seconds
    finally:
        await other.close()
        await connection.close()
        await ledger.close()


async def come_and_go(connection: asyncpg.Connection, jobs: int) -> None:
    """Leave what ``jobs`` leave that are queued, claimed and ended in ``OPEN_SECONDS``."""
    now = "extract(epoch FROM clock_timestamp())::float8"
    await connection.execute(
        "INSERT INTO jobs (caller, request_id, fingerprint, record, model, counted_as, detached, "
        "goal, accepted_at, queued_at, state, epoch) "
        "SELECT 'gone', n::text, $2, $3, 'demo', 'gone', true, at + $5, at, at, 0, 1 "
        f"FROM (SELECT n, {now} - $4::float8 * (1 - n::float8 / $1) AS at "
        "FROM generate_series(1, $1::int) AS n) AS gone",
        jobs,
        b"f" * 32,
        RECORD,
        OPEN_SECONDS,
        GOAL_SECONDS,
    )
    await connection.execute("UPDATE jobs SET state = 1, epoch = 2 WHERE caller = 'gone'")
    await connection.execute(f"UPDATE jobs SET state = 2, ended_at = {now} WHERE caller = 'gone'")


async def claims(
    ledger: PostgresLedger,
    times: int,
    numbers: Iterator[int],
    *,
    from_beginning: bool = False,
) -> list[float]:
    """Seconds of each of ``times`` claims of one job, while some wait; ``numbers``: of the jobs."""
    for _ in range(QUEUED):
        await ledger.begin(draft(next(numbers)), claimed=False)
    await ledger.beat()
    seconds = []
    for count in range(times):
        if from_beginning:
            ledger._session.front.forget()
        began = time.perf_counter()
        (entry,) = await ledger.claim(1, models=MODELS)
        seconds.append(time.perf_counter() - began)
        await ledger.end(entry.hold, Standing.FINISHED)
        await ledger.begin(draft(next(numbers)), claimed=False)
        if count % 100 == 99:
            await ledger.beat()
    while left := await ledger.claim(QUEUED, models=MODELS):
        for entry in left:
            await ledger.end(entry.hold, Standing.FINISHED)
    return seconds


def measure(options: argparse.Namespace) -> Measurement:
    """Everything."""
    plans = {
        load: Plan(
            servers=options.servers,
            engines=8,
            resident=8,
            jobs_per_second=options.jobs_per_second,
            load=load,
        )
        for load in LOADS
    }
    with cluster(fsync=True) as database:
        operations = asyncio.run(measure_operations(database, options.servers, options.times))
    with cluster() as database:  # A flush takes longer than a claim, and would hide it.
        seconds = asyncio.run(measure_claims(database, options.ended, options.times))
    rates = {
        str(load): FleetSimulation(plan, seed=1).run(options.seconds)
        for load, plan in plans.items()
    }
    return Measurement(
        figures={"operations": operations, "claims": seconds, "rates": rates},
        model={"id": "none"},
        settings={"plan": {k: v for k, v in asdict(plans[LOADS[0]]).items() if k != "load"}},
    )


def slower(results: Results) -> tuple[float, float, float]:
    """A claim beside the open transaction, in the median quiet time: the median, its interval."""
    quiet = statistics.median(results.figures["claims"]["quiet"])
    beside = bootstrap_median(results.figures["claims"]["beside"])
    return beside.value / quiet, beside.low / quiet, beside.high / quiet


def goals(results: Results) -> list[Goal]:
    """What old transactions may do to a claim."""
    value, low, high = slower(results)
    name = f"a claim beside an open transaction and {results.settings['ended']} ended jobs"
    return [Goal(f"{name}, against a quiet one", value, SLOWER, False, (low, high), is_cost=True)]


def totals(results: Results, load: float) -> tuple[float, float]:
    """Statements a second of a simulated fleet, and the CPUs of the database that they take."""
    rates: Mapping[str, float] = results.figures["rates"][str(load)]
    operations = results.figures["operations"]
    known = {name: rate for name, rate in rates.items() if name in operations}
    return (
        sum(rate * operations[name]["statements"] for name, rate in known.items()),
        sum(rate * operations[name]["cpu"] / 1000 for name, rate in known.items()),
    )


def describe(results: Results) -> list[str]:
    """The parts of the section."""
    settings, figures = results.settings, results.figures
    plan, operations = settings["plan"], figures["operations"]
    rows = [
        [
            name,
            f"{cost['wait']:.2f}",
            f"{cost['cpu']:.2f}",
            f"{cost['statements']:.0f}",
            *(f"{figures['rates'][str(load)].get(name, 0.0):.0f}" for load in LOADS),
        ]
        for name, cost in operations.items()
    ]
    sums = {load: totals(results, load) for load in LOADS}
    rows.append(["statements a second", "", "", "", *(f"{sums[load][0]:.0f}" for load in LOADS)])
    rows.append(["CPUs of the database", "", "", "", *(f"{sums[load][1]:.2f}" for load in LOADS)])
    quiet, beside, whole = (
        statistics.median(figures["claims"][name]) * 1000
        for name in ("quiet", "beside", "from the beginning")
    )
    return [
        f"PostgreSQL on this machine, {settings['servers']} servers in the ledger, "
        f"{settings['times']} times each operation, one at a time, commits flushed to the disk: "
        "what its caller waits, and what all processes of PostgreSQL compute. On the right a "
        f"simulation: {plan['servers']} servers with {plan['engines']} engines of "
        f"{plan['resident']} jobs each, {plan['jobs_per_second']:.0f} jobs a second at random "
        "servers, which take that part of the fleet's capacity; operations a second, by the rules "
        f"that the servers follow, over {settings['seconds']:.0f} s.",
        table(
            [
                "operation",
                "ms",
                "ms of CPU",
                "statements",
                *(f"a second, {load:.0%}" for load in LOADS),
            ],
            rows,
        ),
        f"Without flushes a claim takes {quiet:.2f} ms in quiet, and {beside:.2f} ms beside a "
        f"transaction that has been open for {OPEN_SECONDS / 60:.0f} minutes, in which "
        f"{settings['ended']} jobs were queued, claimed and ended (their rows are made at once). "
        "As long as it is open, their dead rows cannot be removed: a claim that searched "
        f"the queue from its beginning would take {whole:.2f} ms.",
        goals_table("ratio", goals(results), "×"),
    ]


BENCHMARK = Benchmark(
    name="fleet",
    title="Measured",
    command="make bench-fleet",
    amounts={
        "times": Amount(2000, 20, "times of each operation"),
        "servers": Amount(100, 3, "servers in the ledger, and in the simulation"),
        "jobs_per_second": Amount(300.0, 9.0, "arrivals in the simulation"),
        "seconds": Amount(600.0, 10.0, "simulated"),
        "ended": Amount(100_000, 1000, "jobs that come and go beside an open transaction"),
    },
    measure=measure,
    describe=describe,
    goals=goals,
    page="fleet.md",
)
