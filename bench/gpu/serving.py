"""The engine on Stable Diffusion 1.4: images alone, a saturated closed loop, an open load."""

import statistics
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch

from bench.engine.comparison import CALLERS, Comparison
from bench.engine.report import images_per_second
from bench.gpu.phases import Figures, Plan
from bench.inprocess.engine import EnginePeer
from bench.report.results import Run
from bench.workload.arrivals import Answer, Arrivals
from bench.workload.requests import Request, mixed, poisson, uniform
from darkroom_server.backends.thread import ThreadEngine
from darkroom_server.core.engine_config import Compile, Preset

GUIDANCE = 7.5
SHORT_STEPS = 20
LOAD = 0.7
"""Share of the capacity of static batches."""


def engine(preset: Preset, plan: Plan, *, compiled: bool = False) -> Iterator[Figures]:
    """An engine of ``preset`` as users start it: its start, images alone, many callers.

    ``compiled``: it first compiles its denoiser, unless an earlier run did. Else it never does.
    """
    fields: dict[str, Any] = {"preset": preset, "compile": Compile.OFF}
    if compiled:
        fields |= {"compile": Compile.BLOCKING, "compile_cache": plan.compiled}
    config = plan.config(plan.sd14_source(), **fields)
    began = time.monotonic()
    with closing(EnginePeer(ThreadEngine(config))) as peer:
        runtime, limits = peer.info.runtime, peer.info.limits
        yield {
            "start_seconds": time.monotonic() - began,
            "denoiser": runtime.denoiser,
            "dtype": runtime.dtype,
            "attention": runtime.attention,
            "max_rows": limits.max_rows,
        }
        requests = uniform(mixed(plan.closed, plan.seed), plan.long_steps, GUIDANCE)
        lone: dict[str, Figures] = {}
        for steps in _lone_steps(plan):
            lone[str(steps)] = _alone(peer, requests[0], steps, plan.lone)
            yield {"lone": lone}
        peer.batch_times()
        answers = peer.serve(Arrivals(requests, 2 * CALLERS))
        yield {
            "saturated": {
                "callers": 2 * CALLERS,
                "images": len(answers),
                "images_per_second": images_per_second([_run(answers, 2 * CALLERS)]),
                "batches": _batches(peer),
            }
        }
        yield {"peak_bytes": peer.peak_bytes()}
        if plan.torch_device.type == "cuda":
            yield {"reserved_bytes": torch.cuda.memory_reserved()}


def load(plan: Plan) -> Iterator[Figures]:
    """The mixed load at a share of the capacity of static batches, beside these."""
    with closing(Comparison(plan.sd14_source().location, Preset.FAST)) as peers:
        lone = {}
        for steps in _lone_steps(plan):
            lone[str(steps)] = peers.lone(plan.pairs, steps)
            yield {"lone": lone}
        both = ("static", "engine")
        closed = mixed(plan.closed, plan.seed)
        peers.compete("closed", 0, closed, callers=CALLERS, peers=both)
        rates = {name: peers.capacity(name) for name in both}
        yield {"images_per_second": rates}
        rate = LOAD * rates["static"]
        requests = poisson(mixed(plan.arrivals, plan.seed + 100), rate, plan.seed + 100)
        peers.compete("open", 0, requests, rate=rate, peers=both)
        latencies = {
            run.peer: [round(answer.latency, 5) for answer in run.answers]
            for run in peers.runs
            if run.scenario == "open"
        }
        yield {"load": LOAD, "rate": rate, "latencies": latencies}


def _lone_steps(plan: Plan) -> list[int]:
    """The steps of lone images, those of short ones first."""
    return sorted({min(SHORT_STEPS, plan.long_steps), plan.long_steps})


def _alone(peer: EnginePeer, request: Request, steps: int, count: int) -> Figures:
    """Seconds of the first lone request, and of those after it."""
    seconds = [
        peer.serve(Arrivals([replace(request, steps=steps, seed=seed)], 1))[0].latency
        for seed in range(count)
    ]
    return {"first": seconds[0], "seconds": statistics.median(seconds[1:])}


def _run(answers: list[Answer], callers: int) -> Run:
    return Run(
        scenario="saturated",
        peer="engine",
        round=0,
        nominal_before=0.0,
        nominal_after=0.0,
        answers=answers,
        callers=callers,
    )


def _batches(peer: EnginePeer) -> list[Figures]:
    """Milliseconds of the batches since the previous call, by their rows."""
    by_rows: dict[int, list[float]] = {}
    for rows, seconds in peer.batch_times():
        by_rows.setdefault(rows, []).append(seconds * 1000)
    return [
        {"rows": rows, "milliseconds": statistics.median(found), "count": len(found)}
        for rows, found in sorted(by_rows.items())
    ]
