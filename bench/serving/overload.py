"""Many callers that request several times what the engine can serve.

Each request has a deadline. The server, and the same server with first come, first served, get the
same schedule over the real wire.
"""

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import grpc
import psutil
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_status import rpc_status

from bench.micro.lifecycle import until
from bench.report.benchmark import Amount, Benchmark, Measurement
from bench.report.goals import Goal
from bench.report.markdown import table
from bench.report.results import Results
from bench.report.statistics import quantile
from bench.workload.requests import STEPS, Request, mixed, poisson
from darkroom.v1 import generation_pb2, generation_pb2_grpc

IMAGE, EXPIRED, MALFORMED = "image", "expired", "malformed"

PROMPT_SECONDS = 1.0
"""The longest that a rejection should take while the machine generates images."""

NAMES = {"darkroom": "Darkroom", "first come": "first come, first served"}

PORT = 50961
SERVERS: dict[str, list[str]] = {"darkroom": [], "first come": ["--first-come"]}
SATURATING = 16
"""Callers of the closed loop that measures the capacity: enough to fill every batch."""

LONE_ROUNDS = 3


class Call(NamedTuple):
    """One call: ``outcome`` is IMAGE, EXPIRED, MALFORMED or the reason of a rejection.

    ``arrival`` counts from the start, ``limit`` from the arrival to the deadline, in seconds.
    """

    steps: int
    arrival: float
    limit: float
    outcome: str
    seconds: float

    @property
    def rejected(self) -> bool:
        """The server rejected it with a reason."""
        return self.outcome not in (IMAGE, EXPIRED) and not self.outcome.startswith(MALFORMED)


@contextmanager
def server(model: str | None, flags: Sequence[str]) -> Iterator[psutil.Popen]:
    """A server that is ready, in a process of its own, stopped at the end."""
    if model:
        flags = [*flags, "--model", model]
    command = [sys.executable, "-m", "bench.serving.first_come_server", str(PORT), *flags]
    process = psutil.Popen(command)
    try:
        until(PORT, "", health_pb2.HealthCheckResponse.SERVING)
        yield process
    finally:
        process.terminate()
        process.wait()


class Callers:
    """Callers with a connection each, among which requests are distributed."""

    def __init__(self, port: int, callers: int) -> None:
        # Without this option all channels would share one connection.
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channels = [
            grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) for _ in range(callers)
        ]

    async def lone(self) -> dict[int, float]:
        """Seconds of a lone request of each class."""
        seconds = {}
        for steps in STEPS:
            requests = [r for r in mixed(100, seed=5) if r.steps == steps][:LONE_ROUNDS]
            calls = [await self._call(request, 0, None) for request in requests]
            seconds[steps] = statistics.median(call.seconds for call in calls)
        return seconds

    async def capacity(self, requests: Sequence[Request]) -> tuple[float, float]:
        """Images/s and steps/s while all of ``SATURATING`` callers are busy."""
        unsent = list(requests)[::-1]
        began = time.monotonic()
        ends: list[tuple[float, int]] = []

        async def call(caller: int) -> None:
            while unsent:
                request = unsent.pop()
                await self._call(request, caller, None)
                ends.append((time.monotonic() - began, request.steps))

        async with asyncio.TaskGroup() as group:
            for caller in range(SATURATING):
                group.create_task(call(caller))
        done = sorted(ends)[: max(1, len(ends) - SATURATING)]
        busy = done[-1][0]
        return len(done) / busy, sum(steps for _, steps in done) / busy

    async def overload(self, requests: Sequence[Request], limits: Sequence[float]) -> list[Call]:
        """Send each request at its arrival, with its limit in seconds as the deadline."""
        began = time.monotonic()

        async def call(request: Request, limit: float) -> Call:
            await asyncio.sleep(began + request.arrival - time.monotonic())
            return await self._call(request, request.index, limit)

        tasks = map(call, requests, limits)
        return await asyncio.gather(*tasks)

    async def close(self) -> None:
        """Close the connections."""
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def _call(self, request: Request, caller: int, limit: float | None) -> Call:
        channel = self._channels[caller % len(self._channels)]
        stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
        wanted = generation_pb2.GenerateRequest(
            prompt=request.prompt,
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            seed=request.seed,
        )
        began = time.monotonic()
        try:
            response = await stub.Generate(wanted, timeout=limit)
            outcome = IMAGE if response.images[0].data else MALFORMED
        except grpc.aio.AioRpcError as error:
            outcome = _outcome(error)
        seconds = time.monotonic() - began
        return Call(request.steps, request.arrival, limit or 0.0, outcome, seconds)


def _outcome(error: grpc.aio.AioRpcError) -> str:
    """The server's reason; without one, whether the deadline expired."""
    status: Any = rpc_status.from_call(error)  # type: ignore[arg-type]
    for packed in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if packed.Unpack(info) and info.domain == "darkroom" and error.details():
            return EXPIRED if info.reason == "DEADLINE_EXPIRED" else info.reason
    late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    return EXPIRED if late else f"{MALFORMED}: {error.code().name}"


async def watch_memory(process: psutil.Popen, found: list[int]) -> None:
    """Record the resident memory of the server and its engine in bytes, twice a second."""
    while True:
        family = [process, *process.children(recursive=True)]
        found.append(sum(each.memory_info().rss for each in family))
        await asyncio.sleep(0.5)


async def overload(
    process: psutil.Popen, options: argparse.Namespace, measured: Mapping[str, Any]
) -> dict[str, Any]:
    """The capacity of one server, and its calls under overload; ``measured`` has the schedule."""
    callers = Callers(PORT, options.callers)
    await callers.capacity(mixed(SATURATING, seed=4))  # Warm up.
    lone = await callers.lone()
    images, steps = await callers.capacity(mixed(options.closed, options.seed))
    rate = measured.get("rate", options.factor * images)
    lone = measured.get("lone", lone)
    count = max(1, round(rate * options.seconds))
    requests = poisson(mixed(count, options.seed + 1), rate, options.seed + 1)
    rng = random.Random(options.seed + 2)
    limits = [lone[request.steps] * rng.uniform(*options.patience) for request in requests]
    memory: list[int] = []
    watching = asyncio.create_task(watch_memory(process, memory))
    calls = await callers.overload(requests, limits)
    watching.cancel()
    await callers.close()
    return {
        "rate": rate,
        "lone": lone,
        "images_per_second": images,
        "steps_per_second": steps,
        "memory_before": memory[0],
        "memory_peak": max(memory),
        "memory_after": memory[-1],
        "calls": [list(call) for call in calls],
    }


def measure(options: argparse.Namespace) -> Measurement:
    """Both servers, one after another."""
    figures: dict[str, Any] = {}
    for name, flags in SERVERS.items():
        with server(options.model, flags) as process:
            first: dict[str, Any] = next(iter(figures.values()), {})
            figures[name] = asyncio.run(overload(process, options, first))
        print(f"{name}: {len(figures[name]['calls'])} calls", flush=True)
    return Measurement(figures=figures, model={"id": options.model or "demo"})


def check(options: argparse.Namespace) -> str:
    """Why the amounts do not fit."""
    if options.callers < SATURATING or options.closed <= SATURATING:
        return f"--callers and --closed must be more than {SATURATING}"
    return "" if len(options.patience) == 2 else "--patience needs two numbers"


def in_time(calls: Sequence[Call], seconds: float) -> list[Call]:
    """The calls whose image came before the deadline and before ``seconds`` of the run."""
    return [
        call
        for call in calls
        if call.outcome == IMAGE
        and call.seconds <= call.limit
        and call.arrival + call.seconds <= seconds
    ]


def goals(results: Results) -> list[Goal]:
    """Goodput, well-formed errors, and quick rejections."""
    seconds = results.settings["seconds"]
    calls = _calls(results)
    ours, theirs = (len(in_time(each, seconds)) / seconds for each in calls.values())
    capacity = results.figures["darkroom"]["images_per_second"]
    rejections = [call.seconds for call in calls["darkroom"] if call.rejected]
    odd = sum(call.outcome.startswith(MALFORMED) for call in calls["darkroom"])
    found = [
        Goal("goodput over the capacity", ours / capacity, 0.9, True),
        Goal("malformed answers", float(odd), 0.0, False),
    ]
    if theirs:
        found.append(Goal("goodput over first come, first served", ours / theirs, 1.0, True))
    if rejections:
        late = quantile(rejections, 0.99)
        found.append(Goal("p99 of the rejections, seconds", late, PROMPT_SECONDS, False))
    return found


def describe(results: Results) -> list[str]:
    """A text, and a table of both servers."""
    settings = results.settings
    low, high = settings["patience"]
    first = results.figures["darkroom"]
    return [
        f"{settings['callers']} callers with a connection each request {settings['factor']:g} "
        f"times what the engine can serve, for {settings['seconds']:g} seconds: the mixed "
        f"workload, Poisson arrivals at {first['rate']:.1f} per second, each with a deadline of "
        f"{low:g} to {high:g} times what it takes alone. No caller retries. The peer is the same "
        "server with two changes: jobs and the rows of a batch go in the order of arrival, and no "
        "job is rejected for its deadline. A closed loop just before measures what the engine can "
        "serve. Memory is that of the server and its engine together.",
        _table(results),
    ]


def _table(results: Results) -> str:
    calls = _calls(results)
    seconds = results.settings["seconds"]
    heads = ["", *(NAMES[name] for name in calls)]
    lines: list[tuple[str, list[str]]] = [
        ("calls", [str(len(each)) for each in calls.values()]),
        (
            "images in time, per second",
            [f"{len(in_time(each, seconds)) / seconds:.2f}" for each in calls.values()],
        ),
        ("… of the capacity", _shares(results, calls, "images_per_second")),
        ("… counted in steps", _shares(results, calls, "steps_per_second")),
        ("rejected", [_share(each, [c for c in each if c.rejected]) for each in calls.values()]),
        (
            "expired",
            [_share(each, [c for c in each if c.outcome == EXPIRED]) for each in calls.values()],
        ),
        (
            "malformed answers",
            [
                str(sum(call.outcome.startswith(MALFORMED) for call in each))
                for each in calls.values()
            ],
        ),
        ("rejections, p50 / p99 in ms", [_rejections(each) for each in calls.values()]),
        (
            "memory before / peak / after, MiB",
            [
                " / ".join(
                    f"{results.figures[name][f'memory_{when}'] / 2**20:.0f}"
                    for when in ("before", "peak", "after")
                )
                for name in calls
            ],
        ),
        ("reasons", [_reasons(each) for each in calls.values()]),
    ]
    return table(heads, [[name, *cells] for name, cells in lines])


def _calls(results: Results) -> dict[str, list[Call]]:
    return {name: [Call(*call) for call in results.figures[name]["calls"]] for name in NAMES}


def _shares(results: Results, calls: Mapping[str, Sequence[Call]], unit: str) -> list[str]:
    seconds = results.settings["seconds"]
    shares = []
    for name, each in calls.items():
        done = in_time(each, seconds)
        size = len(done) if unit == "images_per_second" else sum(call.steps for call in done)
        figures: Mapping[str, Any] = results.figures[name]
        shares.append(f"{size / seconds / figures[unit]:.0%}")
    return shares


def _share(calls: Sequence[Call], some: Sequence[Call]) -> str:
    return f"{len(some) / len(calls):.0%}"


def _rejections(calls: Sequence[Call]) -> str:
    seconds = [call.seconds * 1000 for call in calls if call.rejected]
    if not seconds:
        return "–"
    return f"{quantile(seconds, 0.5):.1f} / {quantile(seconds, 0.99):.1f}"


def _reasons(calls: Sequence[Call]) -> str:
    reasons = Counter(call.outcome for call in calls if call.rejected)
    return ", ".join(f"`{reason}` {count}" for reason, count in sorted(reasons.items())) or "–"


BENCHMARK = Benchmark(
    name="overload",
    title="Overload",
    command="make bench-overload",
    amounts={
        "callers": Amount(200, 20, "connections"),
        "factor": Amount(5.0, 5.0, "times what the engine can serve"),
        "seconds": Amount(60.0, 3.0, "duration of the overload"),
        "patience": Amount([4.0, 20.0], [4.0, 20.0], "limits of a deadline, in lone latencies"),
        "closed": Amount(160, 20, "requests of the closed loop"),
        "seed": Amount(0, 0, "of the workload"),
    },
    measure=measure,
    describe=describe,
    goals=goals,
    check=check,
)
