"""How good the estimates are: each job's estimate at its acceptance beside its actual time."""

import argparse
import asyncio
import time
from collections.abc import Sequence
from typing import NamedTuple

from bench.inprocess.engine import job_of
from bench.report.benchmark import Amount, Benchmark, Measurement
from bench.report.goals import Goal
from bench.report.machine import model_source
from bench.report.markdown import table
from bench.report.results import Results, model_facts
from bench.report.statistics import quantile
from bench.workload.requests import STEPS, Request, mixed, poisson
from darkroom_server.backends.process import ProcessEngine
from darkroom_server.core.engine_config import EngineConfig
from darkroom_server.core.model import ModelInfo
from darkroom_server.dispatch import Dispatcher

CALLERS = 8
"""Callers of the closed loop that measures the capacity; the estimator learns from it too."""


class Pair(NamedTuple):
    """The estimate for a request of ``steps``, and its actual time, in seconds."""

    steps: int
    estimate: float
    seconds: float

    @property
    def error(self) -> float:
        """The relative error of the estimate."""
        return abs(self.estimate - self.seconds) / self.seconds


class DispatcherLoad:
    """Submits jobs to a dispatcher with a real engine."""

    def __init__(self, dispatcher: Dispatcher, info: ModelInfo) -> None:
        self._dispatcher = dispatcher
        self._info = info
        self._runs = 0

    async def capacity(self, requests: Sequence[Request]) -> float:
        """Images/s of a closed loop."""
        unsent = list(requests)[::-1]
        began = time.monotonic()

        async def call() -> None:
            while unsent:
                await self._generate(unsent.pop())

        await asyncio.gather(*(call() for _ in range(CALLERS)))
        return len(requests) / (time.monotonic() - began)

    async def open_loop(self, requests: Sequence[Request]) -> list[Pair]:
        """Submit each request at its arrival; returns the estimates and the actual times."""
        began = time.monotonic()

        async def call(request: Request) -> Pair:
            await asyncio.sleep(began + request.arrival - time.monotonic())
            return await self._generate(request)

        return await asyncio.gather(*(call(request) for request in requests))

    async def _generate(self, request: Request) -> Pair:
        self._runs += 1
        job = job_of(request, self._info, time.monotonic(), self._runs)
        accepted = self._dispatcher.submit(job)
        if accepted.estimate is None:
            raise RuntimeError("the dispatcher made no estimate")
        await accepted.result()
        seconds = time.monotonic() - accepted.estimate.made_at
        return Pair(request.steps, accepted.estimate.total, seconds)


def measure(options: argparse.Namespace) -> Measurement:
    """A closed loop for the capacity, and an open loop at each load."""
    return asyncio.run(_measure(options))


async def _measure(options: argparse.Namespace) -> Measurement:
    engine = ProcessEngine(EngineConfig(models=(model_source(options.model),)))
    dispatcher = Dispatcher(
        [engine], ["demo"], max_queued_jobs=10 * options.arrivals, max_resident_samples=64
    )
    dispatcher.start()
    await dispatcher.loaded()
    info = dispatcher.availability.model("demo")
    load = DispatcherLoad(dispatcher, info)
    capacity = await load.capacity(mixed(options.closed, options.seed))
    pairs = {}
    for share in options.loads:
        seed = options.seed + round(share * 100)
        requests = poisson(mixed(options.arrivals, seed), share * capacity, seed)
        pairs[f"{share:g}"] = [list(pair) for pair in await load.open_loop(requests)]
        print(f"load {share:g}: {len(requests)} requests finished", flush=True)
    await dispatcher.close()
    return Measurement(
        figures={"capacity": capacity, "pairs": pairs},
        model=model_facts(info),
        settings={"callers": CALLERS},
    )


def goals(results: Results) -> list[Goal]:
    """The median error at each load."""
    return [
        Goal(f"median error at {load}", quantile([p.error for p in pairs], 0.5), 0.2, False)
        for load, pairs in _pairs(results).items()
    ]


def describe(results: Results) -> list[str]:
    """A text, and a table of the errors."""
    rows = [
        [
            f"{load} of the capacity",
            *(_error(pairs, steps, 0.5) for steps in (None, *STEPS)),
            _error(pairs, None, 0.9),
            f"{quantile([pair.estimate / pair.seconds for pair in pairs], 0.5):.2f}",
        ]
        for load, pairs in _pairs(results).items()
    ]
    heads = ["load", "median error", *(f"{steps} steps" for steps in STEPS)]
    heads += ["p90 of all", "estimate / actual, median"]
    settings = results.settings
    return [
        "The difference between a job's estimate at its acceptance and its actual time until the "
        f"last image, as a share of the latter. {settings['arrivals']} Poisson arrivals of the "
        "mixed workload at each load. The capacity is that of a closed loop of "
        f"{settings['callers']} callers, {results.figures['capacity']:.2f} images/s. An estimate "
        "does not know later arrivals. The goal is a median of 20 %.",
        table(heads, rows),
    ]


def _pairs(results: Results) -> dict[str, list[Pair]]:
    return {
        load: [Pair(*pair) for pair in pairs] for load, pairs in results.figures["pairs"].items()
    }


def _error(pairs: Sequence[Pair], steps: int | None, share: float) -> str:
    errors = [pair.error for pair in pairs if steps is None or pair.steps == steps]
    return f"{quantile(errors, share):.0%}" if errors else "–"


BENCHMARK = Benchmark(
    name="estimates",
    title="Estimates",
    command="make bench-estimates",
    amounts={
        "arrivals": Amount(300, 10, "requests of each open loop"),
        "closed": Amount(120, 16, "requests of the closed loop"),
        "loads": Amount([0.5, 0.7, 0.9], [0.7], "shares of the capacity"),
        "seed": Amount(0, 0, "of the workload"),
    },
    measure=measure,
    describe=describe,
    goals=goals,
)
