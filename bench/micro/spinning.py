"""OpenMP's waiting threads: Darkroom's rule beside threads that always sleep or always spin.

Alone on the machine, and beside one process that keeps a core busy always or half of the time.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from bench.inprocess.engine import EnginePeer
from bench.inprocess.remote import MAX_BATCH_IMAGES
from bench.report.benchmark import Amount, Benchmark, Measurement
from bench.report.machine import model_source
from bench.report.markdown import table
from bench.report.results import Results, model_facts
from bench.report.statistics import bootstrap_median, quantile
from bench.workload.arrivals import Arrivals
from bench.workload.requests import Request, mixed, uniform
from darkroom_server.backends.process import ProcessEngine
from darkroom_server.core.engine_config import EngineConfig
from darkroom_server.core.model import ModelInfo
from darkroom_server.engine.device.spinning import MOST_WAITING, VARIABLES, WaitsForCores

RULE, SLEEP, SPIN = "by the rule", "always sleep", "always spin"
POLICIES = {RULE: None, SLEEP: "PASSIVE", SPIN: "ACTIVE"}
"""The values of OMP_WAIT_POLICY; None: it is not set."""

BESIDE = {"alone": 0.0, "beside a half-busy process": 0.5, "beside a busy process": 1.0}
"""The share of the time for which another process is busy."""
LONE, CLOSED = "a lone image", "an image of a closed loop of 8"
WAITED = "waited"
"""The share of the closed loop for which a thread of the engine waited for a core."""

CALLERS = 8
STEPS = 16
SETTLE = 12
"""Requests before the measurement, seconds in which the rule gets to know the machine."""


BUSY_PROGRAM = """
import sys, time
share, period = float(sys.argv[1]), 0.2
print(flush=True)
while True:
    end = time.perf_counter() + share * period
    while time.perf_counter() < end:
        pass
    time.sleep((1 - share) * period)
"""


@contextmanager
def busy_process(share: float) -> Iterator[None]:
    """A process that keeps a core busy for ``share`` of the time; none for 0."""
    if not share:
        yield
        return
    arguments = [sys.executable, "-c", BUSY_PROGRAM, str(share)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield
        finally:
            process.kill()


@contextmanager
def new_engine(config: EngineConfig, policy: str | None) -> Iterator[EnginePeer]:
    """An engine in a process of its own, with OMP_WAIT_POLICY as ``policy``."""
    environment = {name: v for name, v in os.environ.items() if name not in VARIABLES}
    if policy is not None:
        environment["OMP_WAIT_POLICY"] = policy
    with mock.patch.dict(os.environ, environment, clear=True):
        peer = EnginePeer(ProcessEngine(config))
    try:
        yield peer
    finally:
        peer.close()


def requests(count: int) -> list[Request]:
    """``count`` requests of equal settings."""
    return uniform(mixed(count, seed=3), STEPS, 7.5)


def tasks_of_the_engine() -> Path:
    """The kernel's folder of the threads of the engine, the only one that runs."""
    (engine,) = (
        child
        for child in psutil.Process().children(recursive=True)
        if "darkroom_server.engine.main" in child.cmdline()
    )
    return Path("/proc", str(engine.pid), "task")


def serve(peer: EnginePeer, lone: int, closed: int) -> dict[str, float]:
    """Seconds of a lone image, the median of ``lone``, and of one of ``closed`` in a closed loop.

    Those of the closed loop are its time divided by its images.
    """
    peer.serve(Arrivals(requests(SETTLE), CALLERS))
    alone = [peer.serve(Arrivals([request]))[0].latency for request in requests(lone)]
    waits = WaitsForCores(tasks_of_the_engine())
    answers = peer.serve(Arrivals(requests(closed), CALLERS))
    waited = waits.longest()
    seconds = max(each.arrival + each.latency for each in answers)
    return {LONE: quantile(alone, 0.5), CLOSED: seconds / closed, WAITED: waited / seconds}


def measure(options: argparse.Namespace) -> Measurement:
    """Each policy in an engine of its own, in turns: threads that spin would disturb the others."""
    config = EngineConfig(
        models=(model_source(options.model),), device="cpu", rows=2 * MAX_BATCH_IMAGES
    )
    info: ModelInfo | None = None
    rounds: list[dict[str, Any]] = []
    for round in range(options.rounds):
        for beside, share in BESIDE.items():
            found: dict[str, Any] = {"beside": beside}
            names = list(POLICIES) if round % 2 else list(POLICIES)[::-1]
            for name in names:
                with new_engine(config, POLICIES[name]) as peer:
                    info = info or peer.info
                    config = replace(config, previous_measurements=(info,))
                    with busy_process(share):
                        found[name] = serve(peer, options.lone, options.closed)
            rounds.append(found)
    assert info is not None
    return Measurement(
        figures={"rounds": rounds},
        model=model_facts(info),
        settings={"steps": STEPS, "callers": CALLERS},
    )


def describe(results: Results) -> Sequence[str]:
    """A text, the times, and how long threads waited for cores."""
    times, waits = [], []
    for beside in BESIDE:
        rounds = [each for each in results.figures["rounds"] if each["beside"] == beside]
        for load in (LONE, CLOSED):
            ratios = (
                bootstrap_median([each[RULE][load] / each[other][load] for each in rounds])
                for other in (SLEEP, SPIN)
            )
            times.append(
                [
                    f"{load}, {beside}",
                    *(
                        f"{quantile([r[name][load] for r in rounds], 0.5) * 1e3:.0f}"
                        for name in POLICIES
                    ),
                    *(f"{r.value:.2f} ({r.low:.2f} to {r.high:.2f})" for r in ratios),
                ]
            )
        shares = [[r[name][WAITED] for r in rounds] for name in POLICIES]
        waits.append([beside, *(f"{min(s):.2f} to {max(s):.2f}" for s in shares)])
    return [
        "Threads of OpenMP that wait for each other can spin or sleep. Darkroom lets them spin "
        "unless other programs want the cores (`engine/device/spinning.py`); `OMP_WAIT_POLICY` "
        "set to `PASSIVE` lets them always sleep, set to `ACTIVE` always spin. Images of "
        f"{results.settings['steps']} steps with guidance: ms, medians of "
        f"{results.settings['rounds']} rounds in which the three take turns, each in a new engine "
        "process; median ratios of a round with their 95 % interval. The other process keeps one "
        "core busy, always or for every other tenth of a second.",
        table(["ms", *POLICIES, f"{RULE} / {SLEEP}", f"{RULE} / {SPIN}"], times),
        "The share of the closed loop for which the thread that waited longest waited for a core; "
        f"the rule's bound is {MOST_WAITING:g}.",
        table(["waited for a core", *POLICIES], waits),
    ]


BENCHMARK = Benchmark(
    name="spinning",
    title="Threads that spin or sleep",
    command="python -m bench.micro spinning",
    amounts={
        "rounds": Amount(6, 1, "engines of each policy, alone and beside others"),
        "lone": Amount(6, 1, "lone images of each engine"),
        "closed": Amount(40, 9, "images of each engine's closed loop"),
    },
    measure=measure,
    describe=describe,
)
