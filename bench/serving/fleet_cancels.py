"""How fast a cancel at one server ends a job that another one runs: in ms, of a known step.

Two servers in processes of their own share a ledger in a real PostgreSQL. The engine of the first
begins a step at a known interval, and logs when it is asked to cancel a job and when it has removed
it, by a clock that all processes of a machine share.
"""

import argparse
import asyncio
import json
import queue
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import grpc

from bench.report.benchmark import Amount, Benchmark, Measurement
from bench.report.goals import Goal
from bench.report.markdown import goals_table, table
from bench.report.results import Results
from bench.report.statistics import bootstrap_median, quantile
from darkroom.v1 import generation_pb2, generation_pb2_grpc
from tools.postgres import Cluster, cluster

SERVER = Path(__file__).with_name("cancel_server.py")

STEP_SECONDS = 0.05
"""Between two steps of the engine."""

STEPS = 1000
"""Of each job: it runs until it is cancelled."""

MORE_MS = 10.0
"""What a cancel through another server may take besides the step that is under way."""

WAIT_SECONDS = 30.0

NAMES = {
    "reached": "the engine is asked to remove the job",
    "answered": "the caller has its answer",
    "removed": "the engine has removed the job, at the end of its step",
}


class TimedServer:
    """A server in a process; ``logged`` are its engine's lines, as the engine logs them."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.address = ""
        self._process = process
        self._lines: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.address = self.logged("serving")["address"]

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(json.loads(line))
        self._lines.put({"event": "ended"})

    def logged(self, event: str) -> dict[str, Any]:
        """The next line about ``event``; raises ``RuntimeError`` if the server ends."""
        while (line := self._lines.get(timeout=WAIT_SECONDS))["event"] != event:
            if line["event"] == "ended":
                raise RuntimeError(f"a server ended with {self._process.wait()}")
        return line


@contextmanager
def server(database: Cluster, name: str) -> Iterator[TimedServer]:
    """A server that serves."""
    process = subprocess.Popen(
        [sys.executable, SERVER, database.url, name, str(STEP_SECONDS)],
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield TimedServer(process)
        finally:
            process.terminate()
            process.wait()  # While its lines are still read.


def measure_cancels(database: Cluster, times: int) -> dict[str, list[float]]:
    """Seconds from the call to each of ``NAMES``, of ``times`` jobs one after another."""
    dice = random.Random(1)
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    with ExitStack() as stack:
        runs = stack.enter_context(server(database, "runs"))
        other = stack.enter_context(server(database, "other"))
        here, there = (
            generation_pb2_grpc.GenerationServiceStub(
                stack.enter_context(grpc.insecure_channel(each.address))
            )
            for each in (runs, other)
        )
        wait_until_listed(database, 2)
        for number in range(times):
            request_id = f"job-{number}"
            request = generation_pb2.GenerateRequest(
                prompt="a star", steps=STEPS, request_id=request_id
            )
            here.SubmitGeneration(generation_pb2.SubmitGenerationRequest(generation=request))
            runs.logged("started")
            time.sleep(dice.uniform(0.0, STEP_SECONDS))  # Anywhere in a step.
            began = time.monotonic()
            answer = there.CancelGeneration(
                generation_pb2.CancelGenerationRequest(request_id=request_id)
            )
            found["answered"].append(time.monotonic() - began)
            assert answer.cancelled
            found["reached"].append(runs.logged("reached")["at"] - began)
            found["removed"].append(runs.logged("removed")["at"] - began)
    return found


def wait_until_listed(database: Cluster, servers: int) -> None:
    """Wait until the servers know how to reach each other."""

    async def listed() -> int:
        connection = await asyncpg.connect(database.url)
        count: int = await connection.fetchval(
            "SELECT count(*) FROM darkroom.servers WHERE address <> ''"
        )
        await connection.close()
        return count

    while asyncio.run(listed()) < servers:
        time.sleep(0.1)


def measure(options: argparse.Namespace) -> Measurement:
    """Everything."""
    with cluster(fsync=True) as database:
        cancels = measure_cancels(database, options.cancels)
    return Measurement(
        figures={"cancels": cancels},
        model={"id": "none"},
        settings={"step_seconds": STEP_SECONDS},
    )


def goals(results: Results) -> list[Goal]:
    """In ms: of the way to the engine, and until the job has left it."""
    seconds, step = results.figures["cancels"], results.settings["step_seconds"]
    bounds = {"reached": MORE_MS, "removed": step * 1000 + MORE_MS}
    found = {name: bootstrap_median([each * 1000 for each in seconds[name]]) for name in bounds}
    return [
        Goal(
            f"a cancel at another server: {NAMES[name]}",
            median.value,
            bounds[name],
            False,
            (median.low, median.high),
            is_cost=True,
        )
        for name, median in found.items()
    ]


def describe(results: Results) -> list[str]:
    """The parts of the section."""
    seconds, settings = results.figures["cancels"], results.settings
    rows = [
        [title, *(f"{quantile(seconds[name], share) * 1000:.1f}" for share in (0.5, 0.95, 1.0))]
        for name, title in NAMES.items()
    ]
    return [
        f"{settings['cancels']} jobs, one after another, run at one server and are cancelled at "
        "another one, at a random moment of a step. Each server is a process, and its engine "
        f"begins a step every {settings['step_seconds'] * 1000:.0f} ms. ms since the cancel was "
        "sent:",
        table(["until", "median", "95%", "longest"], rows),
        goals_table("median, ms", goals(results)),
    ]


BENCHMARK = Benchmark(
    name="cancels",
    title="Measured: a cancel at another server",
    command="make bench-fleet",
    amounts={"cancels": Amount(300, 3, "jobs that are cancelled at another server")},
    measure=measure,
    describe=describe,
    goals=goals,
    page="fleet.md",
)
