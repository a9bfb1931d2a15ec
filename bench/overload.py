"""Many callers who want several times what the engine can do: ``python -m bench.overload``.

Each request has a deadline. The server as it is, and the same one that serves first come, first
served, get the same schedule through the real wire. Writes ``bench/results`` and a part of
``docs/benchmarks.md``.
"""

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_status import rpc_status

from bench.lifecycle import until
from bench.machine import this_machine, versions
from bench.overload_page import EXPIRED, IMAGE, MALFORMED, Call, goals, page
from bench.results import RESULTS, Results, save, today
from bench.sections import DOCS, write_section
from bench.workload import STEPS, Request, mixed, poisson
from darkroom.v1 import generation_pb2, generation_pb2_grpc

PORT = 50961
CONTENDERS: dict[str, list[str]] = {"darkroom": [], "first come": ["--first-come"]}
SATURATING = 16
"""Callers of the closed loop that tells what the engine can do: as many as fill its passes."""

LONE_ROUNDS = 3


@contextmanager
def server(options: argparse.Namespace, flags: Sequence[str]) -> Iterator[psutil.Popen]:
    """A contender, ready, in a process of its own, and stopped at the end."""
    if options.model:
        flags = [*flags, "--model", options.model]
    command = [sys.executable, "-m", "bench.overload_server", str(options.port), *flags]
    process = psutil.Popen(command)
    try:
        until(options.port, "", health_pb2.HealthCheckResponse.SERVING)
        yield process
    finally:
        process.terminate()
        process.wait()


class Crowd:
    """Callers with a connection each, who share requests out among them."""

    def __init__(self, port: int, callers: int) -> None:
        # Else all of them would share one connection.
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channels = [
            grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) for _ in range(callers)
        ]

    async def lone(self) -> dict[int, float]:
        """Seconds that a request of each class takes alone."""
        seconds = {}
        for steps in STEPS:
            requests = [r for r in mixed(100, seed=5) if r.steps == steps][:LONE_ROUNDS]
            calls = [await self._call(request, 0, None) for request in requests]
            seconds[steps] = statistics.median(call.seconds for call in calls)
        return seconds

    async def capacity(self, requests: Sequence[Request]) -> tuple[float, float]:
        """Images/s and steps/s while all of ``SATURATING`` callers are there."""
        left = list(requests)[::-1]
        began = time.monotonic()
        ends: list[tuple[float, int]] = []

        async def call(caller: int) -> None:
            while left:
                request = left.pop()
                await self._call(request, caller, None)
                ends.append((time.monotonic() - began, request.steps))

        async with asyncio.TaskGroup() as group:
            for caller in range(SATURATING):
                group.create_task(call(caller))
        done = sorted(ends)[: max(1, len(ends) - SATURATING)]
        busy = done[-1][0]
        return len(done) / busy, sum(steps for _, steps in done) / busy

    async def overload(self, requests: Sequence[Request], limits: Sequence[float]) -> list[Call]:
        """Each request at its arrival, with so many seconds until its deadline."""
        began = time.monotonic()

        async def call(request: Request, limit: float) -> Call:
            await asyncio.sleep(began + request.arrival - time.monotonic())
            return await self._call(request, request.index, limit)

        tasks = map(call, requests, limits)
        return await asyncio.gather(*tasks)

    async def close(self) -> None:
        """Let the connections go."""
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
    """The reason that the server gave; where it gave none, whether the caller's time was up."""
    status: Any = rpc_status.from_call(error)  # type: ignore[arg-type]
    for packed in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if packed.Unpack(info) and info.domain == "darkroom" and error.details():
            return EXPIRED if info.reason == "DEADLINE_EXPIRED" else info.reason
    late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    return EXPIRED if late else f"{MALFORMED}: {error.code().name}"


async def watch_memory(process: psutil.Popen, found: list[int]) -> None:
    """Note the resident memory of the server and its engine, twice a second."""
    while True:
        family = [process, *process.children(recursive=True)]
        found.append(sum(each.memory_info().rss for each in family))
        await asyncio.sleep(0.5)


async def contend(
    process: psutil.Popen, options: argparse.Namespace, measured: Mapping[str, Any]
) -> dict[str, Any]:
    """What one server can do, and what it does of the overload; the schedule is the first one's."""
    crowd = Crowd(options.port, options.callers)
    await crowd.capacity(mixed(SATURATING, seed=4))  # Warm up.
    lone = await crowd.lone()
    images, steps = await crowd.capacity(mixed(options.closed, options.seed))
    rate = measured.get("rate", options.factor * images)
    lone = measured.get("lone", lone)
    count = max(1, round(rate * options.seconds))
    requests = poisson(mixed(count, options.seed + 1), rate, options.seed + 1)
    draw = random.Random(options.seed + 2)
    limits = [lone[request.steps] * draw.uniform(*options.patience) for request in requests]
    memory: list[int] = []
    watching = asyncio.create_task(watch_memory(process, memory))
    calls = await crowd.overload(requests, limits)
    watching.cancel()
    await crowd.close()
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then write the results and the page."""
    parser = argparse.ArgumentParser(prog="bench.overload", description=__doc__)
    parser.add_argument("--model", help="a pipeline folder; the demo model unless told")
    parser.add_argument("--callers", type=int, default=200)
    parser.add_argument("--factor", type=float, default=5.0, help="times what the engine can do")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--closed", type=int, default=160, help="requests of the closed loop")
    parser.add_argument(
        "--patience",
        type=float,
        nargs=2,
        default=[4.0, 20.0],
        help="a deadline is between so many times what the request takes alone",
    )
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="a sentence for the page, on the circumstances")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args(arguments)
    if options.callers < SATURATING or options.closed <= SATURATING:
        parser.error(f"--callers and --closed must be more than {SATURATING}")
    figures: dict[str, Any] = {}
    for name, flags in CONTENDERS.items():
        with server(options, flags) as process:
            first: dict[str, Any] = next(iter(figures.values()), {})
            figures[name] = asyncio.run(contend(process, options, first))
        print(f"{name}: {len(figures[name]['calls'])} calls", flush=True)
    results = Results(
        bench="overload",
        date=today(),
        machine=this_machine(),
        versions=versions(),
        model={"id": options.model or "demo"},
        settings={
            "callers": options.callers,
            "factor": options.factor,
            "seconds": options.seconds,
            "patience": options.patience,
            "closed": options.closed,
            "seed": options.seed,
        },
        figures=figures,
        note=options.note,
    )
    text = page(results)
    print(text)
    print(save(results, options.results).name)
    write_section("benchmarks.md", "Benchmarks", "overload", text, options.docs)
    for goal in goals(results):
        print(f"{'met' if goal.met else 'MISSED':7}{goal.name}: {goal.reached:.3f}")


if __name__ == "__main__":
    main()
