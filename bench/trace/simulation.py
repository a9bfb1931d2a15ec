"""The trace in virtual time: our own dispatcher, with batches and loads of measured lengths."""

import asyncio
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bench.trace.costs import LoadCosts
from bench.trace.figures import Swaps, figures_of
from bench.trace.policies import Policy, dispatcher_of, exchanged
from bench.trace.requests import TraceRequest
from bench.trace.virtual import VirtualEngine, run_virtually
from bench.workload.arrivals import Answer, Outcome
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.job import ImageFormat, Job
from darkroom_server.core.model import ModelInfo
from darkroom_server.core.model_runtime import ModelSpeed
from darkroom_server.dispatch import ActiveJob


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What is simulated: batches of ``speed``, and memory for that many models.

    ``swap_wait`` is the server's setting. A load costs ``load_scale`` times that of SDXL.
    """

    speed: ModelSpeed
    max_rows: int
    device_models: int = 4
    host_models: int = 20
    swap_wait: float = 30.0
    load_scale: float = 1.0

    def model(self, id: str) -> ModelInfo:
        """A model of this speed."""
        info = fake_model(id)
        limits = replace(info.limits, max_rows=self.max_rows)
        return replace(info, speed=self.speed, limits=limits)


def alone(machine: Machine, request: TraceRequest) -> float:
    """Seconds that a request takes alone, with its model in memory."""
    at_once = replace(machine, load_scale=0.0)
    run = simulate([replace(request, arrival=0.0, index=0)], at_once, Policy.OURS)
    return run.answers[0].latency


def steps_per_second(requests: Sequence[TraceRequest], alone: Mapping[int, float]) -> float:
    """Steps of images per second if ``requests`` are served one after another, by their index."""
    steps = sum(request.images * request.steps for request in requests)
    return steps / sum(alone[request.index] for request in requests)


@dataclass(frozen=True, slots=True)
class Simulated:
    """The answers of a run, and its swaps."""

    answers: list[Answer]
    swaps: Swaps

    def figures(self, alone: dict[int, float]) -> dict[str, Any]:
        """See ``figures_of``."""
        return figures_of(self.answers, alone, self.swaps)


def simulate(requests: Sequence[TraceRequest], machine: Machine, policy: Policy) -> Simulated:
    """Serve ``requests`` at their arrivals."""
    costs = LoadCosts(machine.load_scale)
    ids = sorted({request.model for request in requests})
    engine = VirtualEngine([machine.model(id) for id in ids], costs)
    answers: list[Answer] = []

    async def serve() -> None:
        dispatcher = dispatcher_of(policy)(
            [engine],
            ids,
            max_queued_jobs=sys.maxsize,
            max_resident_samples=64,
            early_refusal=False,
            device_memory_budget=machine.device_models,
            host_memory_budget=machine.host_models,
            swap_wait=machine.swap_wait,
        )
        dispatcher.start()
        await dispatcher.loaded()
        for request in requests:
            await asyncio.sleep(request.arrival - time.monotonic())
            active = dispatcher.submit(_job(request))
            active.add_end_callback(partial(end, request, active))
        await dispatcher.drain(1e9)
        await dispatcher.close()

    def end(request: TraceRequest, active: ActiveJob) -> None:
        answer = Answer.of(request, request.arrival, time.monotonic())
        outcome = Outcome.IMAGE if active.finished else Outcome.FAILED
        answers.append(replace(answer, outcome=outcome))

    with exchanged(policy, costs):
        run_virtually(serve)
    return Simulated(
        answers,
        Swaps(
            loads=costs.loads,
            from_disk=costs.from_disk,
            bytes_moved=costs.bytes_moved,
            seconds=costs.seconds,
            longest_wait=max(each.for_model for each in engine.entered.values()),
        ),
    )


def _job(request: TraceRequest) -> Job:
    defaults = fake_model().defaults
    return Job(
        id=str(request.index),
        model=request.model,
        prompt="",
        negative_prompt="",
        width=defaults.width,
        height=defaults.height,
        steps=request.steps,
        guidance_scale=request.guidance_scale,
        seed=request.seed,
        image_count=request.images,
        scheduler=defaults.scheduler,
        format=ImageFormat.PNG,
        quality=defaults.quality,
        exact=False,
        submitted_at=request.arrival,
    )
