"""The cost of the metrics: microseconds of a step and of a request."""

import argparse
import pickle
import time
from collections.abc import Callable
from statistics import median

import torch

from bench.inprocess.engine import EnginePeer
from bench.report.benchmark import Amount, Benchmark, Measurement
from bench.report.machine import model_source
from bench.report.results import Results, model_facts
from bench.workload.arrivals import Arrivals
from bench.workload.requests import mixed
from darkroom_server.backends.thread import ThreadEngine
from darkroom_server.core.engine_config import EngineConfig
from darkroom_server.core.events import BatchDone, Event, StageSeconds
from darkroom_server.dispatch import JobEnded, JobOutcome
from darkroom_server.engine.counters import CounterReporter, Counts
from darkroom_server.engine.device.peak_memory import PeakMemoryTracker
from darkroom_server.service.summary import Outcome, RequestSummary
from darkroom_server.telemetry import Metrics

CPU = torch.device("cpu")
ROUNDS = 5
EDGE = 64
ROWS = 2
STEPS = 16
GOAL = 0.005
"""Share of a step."""


def microseconds(work: Callable[[], object], times: int) -> float:
    """Microseconds of one call of ``work``: the fastest of ``ROUNDS`` of ``times`` calls each."""
    rounds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(times):
            work()
        rounds.append((time.perf_counter() - began) / times * 1e6)
    return min(rounds)


def of_a_step(metrics: Metrics, times: int) -> dict[str, float]:
    """Microseconds of a step in the engine's process, between the processes, and in serving."""
    events: list[Event] = []
    tracker = PeakMemoryTracker(events.append)
    counters = CounterReporter({"demo": (Counts(), Counts(), Counts())}, events.append)
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
        with tracker.watch(CPU, "demo", EDGE, EDGE, ROWS):
            pass
        counters.report()

    return {
        "engine": microseconds(engine, times),
        "crossing": microseconds(lambda: pickle.loads(pickle.dumps(done)), times),
        "serving": microseconds(lambda: metrics.on_event(done), times),
    }


def of_a_request(metrics: Metrics, times: int) -> float:
    """Microseconds of a request in the serving process, from its first metric to its last."""
    summary = RequestSummary(
        arrived=0.0,
        request_id="bench",
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
        metrics.calls.call_started(*method)
        metrics.calls.message(*method, 60, sent=False)
        metrics.on_event(JobEnded("demo", JobOutcome.FINISHED, "decode"))
        metrics.requests.request_ended(summary)
        metrics.calls.message(*method, 9000, sent=True)
        metrics.calls.call_handled(*method, "OK", 0.5)

    return microseconds(request, times)


def step_microseconds(peer: EnginePeer, requests: int) -> float:
    """Median microseconds of a whole step of a lone request with guidance."""
    for request in mixed(requests, seed=4):
        peer.serve(Arrivals([request]))
    return median(seconds for rows, seconds in peer.batch_times() if rows == ROWS) * 1e6


def measure(options: argparse.Namespace) -> Measurement:
    """Metrics of a step and of a request, and a step of the model to compare with."""
    config = EngineConfig(models=(model_source(options.model),), rows=ROWS)
    peer = EnginePeer(ThreadEngine(config))
    step = step_microseconds(peer, options.requests)
    peer.close()
    metrics = Metrics(["demo"])
    return Measurement(
        figures={
            "step": step,
            "of_a_step": of_a_step(metrics, options.times),
            "of_a_request": of_a_request(metrics, options.times),
        },
        model=model_facts(peer.info),
        settings={"rounds": ROUNDS},
    )


def describe(results: Results) -> list[str]:
    """The text of the section."""
    parts, step = results.figures["of_a_step"], results.figures["step"]
    total = sum(parts.values())
    verdict = "under" if total / step < GOAL else "over"
    return [
        f"The metrics of a step cost {total:.1f} µs: {parts['engine']:.1f} in the engine's "
        f"process, {parts['crossing']:.1f} between the processes and {parts['serving']:.1f} in the "
        f"serving process. That is {total / step:.2%} of a step of a lone request, "
        f"{step / 1000:.1f} ms, and {verdict} the goal of {GOAL:.1%}. The metrics of a request "
        f"cost another {results.figures['of_a_request']:.1f} µs. Each figure is the fastest of "
        f"{results.settings['rounds']} rounds of {results.settings['times']} calls. Not included: "
        "once a minute (on a GPU: once a second) the engine also measures the peak memory of a "
        "batch."
    ]


BENCHMARK = Benchmark(
    name="metrics_cost",
    title="What the metrics cost",
    command="python -m bench.micro metrics_cost",
    amounts={
        "requests": Amount(20, 2, "lone requests that give the time of a step"),
        "times": Amount(20_000, 100, "calls in each round"),
    },
    measure=measure,
    describe=describe,
)
