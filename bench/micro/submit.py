"""What a submit costs: milliseconds of CPU in the dispatcher, with one engine and with eight.

The engines are fake, so that only the dispatcher's work is measured: admission with its checks, the
estimate, the choice of an engine. Between two submits an engine runs a batch and jobs end, so that
the load is the same and no two submits find the same jobs.
"""

import argparse
import asyncio
import gc
import itertools
import time
from dataclasses import replace
from typing import NamedTuple

from bench.inprocess.engine import job_of
from bench.report.benchmark import Amount, Benchmark, Measurement
from bench.report.goals import Goal
from bench.report.markdown import goals_table, table
from bench.report.results import Results
from bench.report.statistics import Median, bootstrap_median
from bench.workload.requests import mixed
from darkroom_server.backends.fake import FakeEngine
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.model_runtime import ModelSpeed
from darkroom_server.dispatch import Dispatcher

ENGINES = (1, 8)

PLACES = 8
"""Images in an engine at once: twice as many as share a batch."""

MODEL = replace(
    fake_model(), speed=ModelSpeed(passes=((2, 0.03), (4, 0.05), (8, 0.09)), decode=0.02)
)
"""With the times of a small model, so that jobs have estimates."""

GOAL_MS = 0.5


class Load(NamedTuple):
    """Jobs in each engine before a submit, and jobs that wait."""

    running: int
    waiting: int = 0


LOADS = {
    "idle": Load(0),
    "half full": Load(PLACES // 2),
    "one place left in each engine": Load(PLACES - 1),
    "full, and 32 jobs wait": Load(PLACES, 32),
}


async def submit_ms(engines: int, load: Load, submits: int) -> float:
    """Milliseconds of CPU of one submit: the mean of ``submits``."""
    made = [FakeEngine([MODEL]) for _ in range(engines)]
    live = engines * load.running + load.waiting
    dispatcher = Dispatcher(made, [MODEL.id], max_queued_jobs=live + 1, max_resident_samples=PLACES)
    dispatcher.start()
    await dispatcher.loaded()
    requests = itertools.cycle(mixed(200, seed=1))
    runs = itertools.count()

    def submit() -> float:
        job = job_of(next(requests), MODEL, time.monotonic(), next(runs))
        began = time.thread_time()
        dispatcher.submit(job)
        return time.thread_time() - began

    async def settle() -> None:
        """Bring the load back to what it is to be."""
        for _ in range(3):
            await asyncio.sleep(0)  # The events of the engines are handled.
        while dispatcher.counts.live > live:
            fullest = max(made, key=lambda engine: len(engine.jobs))
            fullest.finish(fullest.jobs[0].id)
            for _ in range(3):
                await asyncio.sleep(0)
        while dispatcher.counts.live < live:
            submit()
        if dispatcher.queued_jobs != load.waiting:
            raise RuntimeError(f"{dispatcher.queued_jobs} jobs wait, and not {load.waiting}")

    spent = 0.0
    for number in range(submits):
        await settle()
        spent += submit()
        made[number % engines].advance()
    while dispatcher.counts.live:
        for engine in made:
            engine.advance()
        await asyncio.sleep(0)
    await dispatcher.close()
    return spent / submits * 1000


def measure(options: argparse.Namespace) -> Measurement:
    """All loads with all numbers of engines, in turns; the first round warms up."""
    plans = [(name, engines) for name in LOADS for engines in ENGINES]
    found: dict[str, dict[str, list[float]]] = {
        name: {str(engines): [] for engines in ENGINES} for name in LOADS
    }
    # The garbage collector need not go through what the benchmarks import: torch above all, which
    # is never in the serving process.
    gc.collect()
    gc.freeze()
    for number in range(options.rounds + 1):
        first = number % len(plans)
        for name, engines in plans[first:] + plans[:first]:
            spent = asyncio.run(submit_ms(engines, LOADS[name], options.submits))
            if number:
                found[name][str(engines)].append(spent)
    gc.unfreeze()
    return Measurement(figures=found, model={"id": "none"}, settings={"places": PLACES})


def of(results: Results, load: str, engines: int) -> Median:
    """Milliseconds of a submit."""
    return bootstrap_median(results.figures[load][str(engines)])


def goals(results: Results) -> list[Goal]:
    """What a submit to the most engines may cost if one of them has room."""
    most = max(ENGINES)
    found = []
    for name, load in LOADS.items():
        if not load.waiting:
            spent = of(results, name, most)
            title = f"ms of CPU for a submit with {most} engines, {name}"
            between = (spent.low, spent.high)
            found.append(Goal(title, spent.value, GOAL_MS, False, between, is_cost=True))
    return found


def describe(results: Results) -> list[str]:
    """The parts of the section."""
    settings = results.settings
    rows = []
    for name in LOADS:
        medians = [of(results, name, engines) for engines in ENGINES]
        rows.append([name, *(f"{m.value:.2f} ({m.low:.2f}–{m.high:.2f})" for m in medians)])
    heads = [f"{engines} engine{'s' if engines > 1 else ''}" for engines in ENGINES]
    return [
        "CPU time of the event loop's thread for a submit: admission, the estimate, the choice of "
        f"an engine. The engines are fake, with {settings['places']} places each; the jobs have 8, "
        f"16 or 40 steps. ms, medians of {settings['rounds']} rounds of {settings['submits']} "
        "submits, in which all loads take turns, with the 95 % interval. A job that finds room is "
        "estimated by the jobs in its engine. One that waits is estimated by all jobs in all "
        "engines, because any of them may make room for it.",
        table(["load", *heads], rows),
        goals_table("goal", goals(results), " ms"),
    ]


BENCHMARK = Benchmark(
    name="submit",
    title="What a submit costs",
    command="python -m bench.micro submit",
    amounts={
        "rounds": Amount(9, 2, "rounds of all loads"),
        "submits": Amount(150, 4, "submits of a round"),
    },
    measure=measure,
    describe=describe,
    goals=goals,
)
