"""What the metrics cost: microseconds a step and a request, beside a step of the demo model.

``python -m bench.metrics_cost`` writes ``bench/results`` and a part of ``docs/benchmarks.md``.
"""

import argparse
import pickle
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from darkroom_server.rpc.summary import Outcome, RequestSummary

from bench.arrivals import Arrivals
from bench.machine import model_source, this_machine, versions
from bench.metrics_cost_page import page
from bench.results import RESULTS, Results, model_facts, save, today
from bench.sections import DOCS, write_section
from bench.threaded import EngineContender
from bench.workload import mixed
from darkroom_server.backends.thread import ThreadEngine
from darkroom_server.core.engine_config import EngineConfig
from darkroom_server.core.events import BatchDone, Event, StageSeconds
from darkroom_server.engine.counters import CounterReporter, Counts
from darkroom_server.engine.device.peak_memory import PeakMemoryTracker
from darkroom_server.telemetry import Metrics, Recorder

CPU = torch.device("cpu")
ROUNDS = 5
EDGE = 64
ROWS = 2
STEPS = 16


def microseconds(work: Callable[[], object], times: int) -> float:
    """Of one call of ``work``: the fastest of some rounds of ``times`` calls each."""
    rounds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(times):
            work()
        rounds.append((time.perf_counter() - began) / times * 1e6)
    return min(rounds)


def of_a_step(recorder: Recorder, times: int) -> dict[str, float]:
    """What a step costs the engine's process, the way between them, and the serving process."""
    told: list[Event] = []
    watch = PeakMemoryTracker(told.append)
    tally = CounterReporter({"demo": (Counts(), Counts(), Counts())}, told.append)
    done = BatchDone(
        model="demo",
        width=EDGE,
        height=EDGE,
        rows=ROWS,
        seconds=0.025,
        samples=1,
        joined=0,
        max_rows=8,
    )

    def engine() -> None:
        with watch.watch(CPU, "demo", EDGE, EDGE, ROWS):
            pass
        tally.report()

    return {
        "engine": microseconds(engine, times),
        "crossing": microseconds(lambda: pickle.loads(pickle.dumps(done)), times),
        "serving": microseconds(lambda: recorder.batch_done(done), times),
    }


def of_a_request(recorder: Recorder, times: int) -> float:
    """What a request costs the serving process, from its first count to its last."""
    summary = RequestSummary(
        model="demo",
        outcome=Outcome.FINISHED,
        images=1,
        steps=STEPS,
        rows=ROWS,
        seconds=0.5,
        stages=StageSeconds(queue=0.01, denoise=0.4, decode=0.05, encode_image=0.01),
    )
    method = ("darkroom.v1.GenerationService", "Generate", "unary")

    def request() -> None:
        recorder.call_started(*method)
        recorder.message(*method, 60, sent=False)
        for queued, running in ((1, 0), (0, 1), (0, 0)):
            recorder.jobs("demo", queued, running)
        recorder.ended("demo", "finished", "decode")
        recorder.request_ended(summary)
        recorder.message(*method, 9000, sent=True)
        recorder.call_handled(*method, "OK", 0.5)

    return microseconds(request, times)


def step_microseconds(contender: EngineContender, requests: int) -> float:
    """A step of a lone request with guidance, with all that belongs to it: the median."""
    for request in mixed(requests, seed=4):
        contender.draw(Arrivals([request]))
    return median(seconds for rows, seconds in contender.passes() if rows == ROWS) * 1e6


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then write the results and the page."""
    parser = argparse.ArgumentParser(prog="bench.metrics_cost", description=__doc__)
    parser.add_argument("--model", help="a pipeline folder; the demo model unless told")
    parser.add_argument("--requests", type=int, default=20, help="lone ones, for a step's time")
    parser.add_argument("--times", type=int, default=20_000, help="calls in each round")
    parser.add_argument("--note", default="", help="a sentence for the page, on the circumstances")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args(arguments)
    contender = EngineContender(
        ThreadEngine(EngineConfig(models=(model_source(options.model),), max_rows=ROWS))
    )
    step = step_microseconds(contender, options.requests)
    contender.close()
    recorder = Recorder(Metrics(), ["demo"])
    results = Results(
        bench="metrics_cost",
        date=today(),
        machine=this_machine(),
        versions=versions(),
        model=model_facts(contender.info),
        settings={"requests": options.requests, "times": options.times, "rounds": ROUNDS},
        figures={
            "step": step,
            "of_a_step": of_a_step(recorder, options.times),
            "of_a_request": of_a_request(recorder, options.times),
        },
        note=options.note,
    )
    text = page(results)
    print(text)
    print(save(results, options.results).name)
    write_section("benchmarks.md", "Benchmarks", "metrics-cost", text, options.docs)


if __name__ == "__main__":
    main()
