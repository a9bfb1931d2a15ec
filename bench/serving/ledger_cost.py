"""What a ledger costs: a lone `Generate` against a server without one, and a submit in a file.

Servers run side by side with an engine that takes no time, so that only their own work is measured.
They take turns, in rounds. The server without a ledger is the commit before there was one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc

from bench.report.benchmark import Amount, Benchmark, Measurement
from bench.report.goals import Goal
from bench.report.markdown import goals_table, table
from bench.report.results import ROOT, Results
from bench.report.statistics import Median, bootstrap_median
from darkroom.v1 import generation_pb2, generation_pb2_grpc

BEFORE = "9675e03ec94c"
PACKAGES = ("protos/src", "server/src")
SERVER = Path(__file__).with_name("ledger_server.py")
CALLERS = 8

WITHOUT, MEMORY, SQLITE = "without", "memory", "sqlite"


@contextmanager
def sources_without_a_ledger() -> Iterator[Path]:
    """The packages as they were in ``BEFORE``, without the weights of the demo model."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            [
                "git",
                "archive",
                BEFORE,
                "--",
                *PACKAGES,
                ":(exclude)server/src/darkroom_server/demo_*",
            ],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        subprocess.run(["tar", "x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder)


@contextmanager
def server(sources: Path, ledger: str = "") -> Iterator[str]:
    """A ready server of ``sources`` in a process of its own; its address."""
    path = os.pathsep.join(str(sources / package) for package in PACKAGES)
    process = subprocess.Popen(
        [sys.executable, SERVER, *filter(None, [ledger])],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            entry = json.loads(line)
            if entry["event"] == "imported" and not entry["path"].startswith(f"{sources}/"):
                raise RuntimeError(f"the server is not that of {sources}: {entry['path']}")
            if entry["event"] == "serving":
                break
        else:
            raise RuntimeError(f"the server ended with {process.wait()}")
        # Nobody else reads what it logs, and it must not stop for that.
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield entry["address"]
    finally:
        process.terminate()
        process.wait()


class Caller:
    """Sends the requests that the Python client sends, over one connection."""

    def __init__(self, address: str) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.insecure_channel(address, options)
        self._stub: Any = generation_pb2_grpc.GenerationServiceStub(self._channel)

    def generate(self) -> None:
        """One image, and wait for it."""
        self._stub.Generate(_request())

    def submit(self) -> None:
        """One job, until it is accepted."""
        self._stub.SubmitGeneration(generation_pb2.SubmitGenerationRequest(generation=_request()))

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()


def _request() -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(
        prompt="a star",
        steps=1,
        seed=7,
        request_id=uuid.uuid4().hex,
        on_disconnect=generation_pb2.ON_DISCONNECT_KEEP,
    )


def seconds_of_each(call: Callable[[], None], times: int, callers: int = 1) -> float:
    """Seconds of a call: the mean of ``times`` calls by ``callers`` at a time."""

    def some(_: int) -> None:
        for _ in range(times // callers):
            call()

    began = time.perf_counter()
    if callers == 1:
        some(0)
    else:
        with ThreadPoolExecutor(callers) as pool:
            list(pool.map(some, range(callers)))
    return (time.perf_counter() - began) / (times // callers * callers)


def in_turns(
    rounds: int, works: Mapping[str, Callable[[], float]], title: str
) -> dict[str, list[float]]:
    """Seconds by round of each of ``works``; which one comes first takes turns."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(works[name]())
    print(
        title, {name: f"{statistics.median(each) * 1e6:.0f} µs" for name, each in seconds.items()}
    )
    return {name: each[1:] for name, each in seconds.items()}  # The first one warms up.


def measure(options: argparse.Namespace) -> Measurement:
    """All rounds."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder or None))
        before = stack.enter_context(sources_without_a_ledger())
        addresses = {
            WITHOUT: stack.enter_context(server(before)),
            MEMORY: stack.enter_context(server(ROOT)),
            SQLITE: stack.enter_context(server(ROOT, f"sqlite:{folder}/jobs.db")),
        }
        callers = {name: Caller(address) for name, address in addresses.items()}

        def works(method: str, names: Sequence[str], times: int, count: int = 1) -> Any:
            return {
                name: lambda name=name: seconds_of_each(
                    getattr(callers[name], method), times, count
                )
                for name in names
            }

        calls, rounds = options.calls, options.rounds
        figures = {
            "generate": in_turns(rounds, works("generate", (WITHOUT, MEMORY), calls), "generate"),
            "submit": in_turns(rounds, works("submit", (WITHOUT, MEMORY, SQLITE), calls), "submit"),
            "submit_at_once": in_turns(
                rounds, works("submit", (WITHOUT, MEMORY, SQLITE), calls, CALLERS), "8 callers"
            ),
        }
        for caller in callers.values():
            caller.close()
    return Measurement(
        figures=figures, model={"id": "none"}, settings={"callers": CALLERS, "before": BEFORE}
    )


def ratio(results: Results, of: str, over: str, figure: str) -> Median:
    """Seconds of one server by those of another, of the same round."""
    seconds: Mapping[str, list[float]] = results.figures[figure]
    pairs = zip(seconds[of], seconds[over], strict=True)
    return bootstrap_median([one / other for one, other in pairs])


def goals(results: Results) -> list[Goal]:
    """What the ledger in memory may cost a lone request."""
    lone = ratio(results, MEMORY, WITHOUT, "generate")
    return [
        Goal(
            "seconds of a lone `Generate` with the ledger in memory, against no ledger",
            lone.value,
            1.02,
            False,
            (lone.low, lone.high),
            is_cost=True,
        )
    ]


def describe(results: Results) -> list[str]:
    """The parts of the section."""
    settings = results.settings

    def row(title: str, figure: str, names: Sequence[str]) -> list[str]:
        cells = []
        for name in (WITHOUT, MEMORY, SQLITE):
            if name not in names:
                cells.append("–")
                continue
            each = statistics.median(results.figures[figure][name]) * 1e6
            spread = ratio(results, name, WITHOUT, figure)
            cells.append(
                f"{each:.0f}"
                if name == WITHOUT
                else f"{each:.0f} ({spread.low:.2f} to {spread.high:.2f} ×)"
            )
        return [title, *cells]

    return [
        f"Three servers side by side on one machine, with an engine that takes no time: one of the "
        f"commit before there was a ledger ({settings['before']}), one with the ledger in memory, "
        f"one with SQLite. {settings['rounds']} rounds of {settings['calls']} calls; the servers "
        "take turns. µs of a call as its caller sees it, medians of the rounds; in brackets the "
        "95 % interval of the median ratio to the first server in the same round.",
        table(
            ["µs", "no ledger", "in memory", "SQLite"],
            [
                row("lone `Generate`", "generate", (WITHOUT, MEMORY)),
                row("`SubmitGeneration`, one at a time", "submit", (WITHOUT, MEMORY, SQLITE)),
                row(
                    f"the same, {settings['callers']} callers at once",
                    "submit_at_once",
                    (WITHOUT, MEMORY, SQLITE),
                ),
            ],
        ),
        goals_table("ratio", goals(results), "×"),
    ]


BENCHMARK = Benchmark(
    name="ledger",
    title="Measured",
    command="make bench-ledger",
    amounts={
        "rounds": Amount(60, 2, "rounds of all servers"),
        "calls": Amount(200, 16, "calls of a round"),
        "folder": Amount("", "", "folder of SQLite's file, on the disk to measure"),
    },
    measure=measure,
    describe=describe,
    goals=goals,
    page="durability.md",
)
