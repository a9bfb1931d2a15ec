"""How good the estimates are: each job's own, made at its acceptance, beside what came true.

``python -m bench.estimates`` writes ``bench/results`` and a part of ``docs/benchmarks.md``.
"""

import argparse
import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

from bench.estimates_page import Pair, page
from bench.machine import model_source, this_machine, versions
from bench.results import RESULTS, Results, model_facts, save, today
from bench.sections import DOCS, write_section
from bench.threaded import job_of
from bench.workload import Request, mixed, poisson
from darkroom_server.backends.process import ProcessEngine
from darkroom_server.core.engine_config import EngineConfig
from darkroom_server.core.model import ModelInfo
from darkroom_server.dispatch import Dispatcher

CALLERS = 8
"""Of the closed loop that tells the capacity; what the estimator learns in it, it keeps."""


class Desk:
    """A dispatcher with the real engine, and jobs that come to it."""

    def __init__(self, dispatcher: Dispatcher, info: ModelInfo) -> None:
        self._dispatcher = dispatcher
        self._info = info
        self._runs = 0

    async def capacity(self, requests: Sequence[Request]) -> float:
        """Images/s of a closed loop."""
        left = list(requests)[::-1]
        began = time.monotonic()

        async def call() -> None:
            while left:
                await self._draw(left.pop())

        await asyncio.gather(*(call() for _ in range(CALLERS)))
        return len(requests) / (time.monotonic() - began)

    async def open_loop(self, requests: Sequence[Request]) -> list[Pair]:
        """Each request at its arrival; what was expected of it, and what came true."""
        began = time.monotonic()

        async def call(request: Request) -> Pair:
            await asyncio.sleep(began + request.arrival - time.monotonic())
            return await self._draw(request)

        return await asyncio.gather(*(call(request) for request in requests))

    async def _draw(self, request: Request) -> Pair:
        self._runs += 1
        job = job_of(request, self._info, time.monotonic(), self._runs)
        accepted = self._dispatcher.submit(job)
        if accepted.estimate is None:
            raise RuntimeError("the dispatcher knows nothing of the engine's speed")
        await accepted.result()
        seconds = time.monotonic() - accepted.estimate.made_at
        return Pair(request.steps, accepted.estimate.total, seconds)


async def measure(options: argparse.Namespace) -> Results:
    """A closed loop for the capacity, and an open one at each load."""
    engine = ProcessEngine(EngineConfig(models=(model_source(options.model),)))
    dispatcher = Dispatcher(
        [engine], ["demo"], max_queued_jobs=10 * options.arrivals, max_resident_samples=64
    )
    dispatcher.start()
    await dispatcher.loaded()
    info = dispatcher.model("demo")
    desk = Desk(dispatcher, info)
    capacity = await desk.capacity(mixed(options.closed, options.seed))
    pairs = {}
    for load in options.loads:
        seed = options.seed + round(load * 100)
        requests = poisson(mixed(options.arrivals, seed), load * capacity, seed)
        pairs[f"{load:g}"] = [list(pair) for pair in await desk.open_loop(requests)]
        print(f"load {load:g}: {len(requests)} requests drawn", flush=True)
    await dispatcher.close()
    return Results(
        bench="estimates",
        date=today(),
        machine=this_machine(),
        versions=versions(),
        model=model_facts(info),
        settings={
            "arrivals": options.arrivals,
            "closed": options.closed,
            "callers": CALLERS,
            "seed": options.seed,
        },
        figures={"capacity": capacity, "pairs": pairs},
        note=options.note,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then write the results and the page."""
    parser = argparse.ArgumentParser(prog="bench.estimates", description=__doc__)
    parser.add_argument("--model", help="a pipeline folder; the demo model unless told")
    parser.add_argument("--arrivals", type=int, default=300, help="of each open loop")
    parser.add_argument("--closed", type=int, default=120, help="requests of the closed loop")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="a sentence for the page, on the circumstances")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args(arguments)
    results = asyncio.run(measure(options))
    text = page(results)
    print(text)
    print(save(results, options.results).name)
    write_section("benchmarks.md", "Benchmarks", "estimates", text, options.docs)


if __name__ == "__main__":
    main()
