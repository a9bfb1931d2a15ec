"""The HTTP door: a lone request beside the same one over gRPC, and what idle streams cost.

One server answers both doors. Pairs of requests take turns, and so do rounds of a closed loop with
and without 200 streams of events that wait for jobs in the queue.
"""

import argparse
import asyncio
import base64
import http.client
import json
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2

from bench.micro.lifecycle import until
from bench.report.benchmark import Amount, Benchmark, Measurement
from bench.report.goals import Goal
from bench.report.markdown import goals_table, table
from bench.report.results import Results
from bench.report.statistics import Median, bootstrap_median
from bench.workload.requests import Request, mixed, uniform
from darkroom.v1 import generation_pb2, generation_pb2_grpc

PORT = 50971
HTTP_PORT = 50972
RESIDENT = 8
"""Samples that the engine holds. The closed loop has twice as many callers, so jobs of a lower
priority stay in the queue."""

CALLERS = 2 * RESIDENT
STEPS = 8
LONE_STEPS = 20
PATIENT_STEPS = 40
PATIENT_PRIORITY = -8
"""Callers with this priority let all others pass for 40 minutes, at ``PATIENT_STEPS``."""

STREAMS_OF_A_JOB = 25
WARM_UP_PAIRS = 3
POLL_SECONDS = 0.02
SETTLE_SECONDS = 4.0
"""Opening and closing the streams takes a moment of the cores that the engine uses."""
TOKENS = {name: secrets.token_hex(16) for name in ("load", "patient")}


@contextmanager
def server(model: str | None) -> Iterator[psutil.Popen]:
    """A server with both doors that is ready, in a process of its own, stopped at the end."""
    priorities = {"load": 0, "patient": PATIENT_PRIORITY}
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.toml"
        tokens.write_text(
            "".join(
                f'[[token]]\nname = "{name}"\nsha256 = "{sha256(token.encode()).hexdigest()}"\n'
                f"priority = {priorities[name]}\n"
                for name, token in TOKENS.items()
            )
        )
        command = [sys.executable, "-m", "darkroom_server", "serve", "--log-level", "error"]
        command += ["--port", str(PORT), "--http-port", str(HTTP_PORT), "--metrics-port", "0"]
        command += ["--max-resident-samples", str(RESIDENT), "--tokens", str(tokens)]
        command += ["--model", f"demo={model}"] if model else []
        process = psutil.Popen(command)
        try:
            until(PORT, "", health_pb2.HealthCheckResponse.SERVING)
            yield process
        finally:
            process.terminate()
            process.wait()


def bearer(caller: str) -> str:
    """The value of ``authorization`` for one of ``TOKENS``."""
    return f"Bearer {TOKENS[caller]}"


def message_of(request: Request) -> generation_pb2.GenerateRequest:
    """``request`` over gRPC."""
    return generation_pb2.GenerateRequest(
        prompt=request.prompt,
        steps=request.steps,
        guidance_scale=request.guidance_scale,
        seed=request.seed,
    )


def body_of(request: Request, **more: Any) -> bytes:
    """``request`` over HTTP."""
    fields = {
        "prompt": request.prompt,
        "steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "seed": request.seed,
    }
    return json.dumps({**fields, **more}).encode()


class LoneCaller:
    """Sends one request at a time, over a connection of each door that stays open."""

    def __init__(self) -> None:
        self._channel = grpc.insecure_channel(f"127.0.0.1:{PORT}")
        self._stub: Any = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._http = http.client.HTTPConnection("127.0.0.1", HTTP_PORT)

    def over_grpc(self, request: Request) -> bytes:
        """The image of ``request``."""
        metadata = (("authorization", bearer("load")),)
        reply = self._stub.Generate(message_of(request), metadata=metadata)
        image: bytes = reply.images[0].data
        return image

    def over_http(self, request: Request) -> bytes:
        """The image of ``request``."""
        headers = {"Content-Type": "application/json", "Authorization": bearer("load")}
        self._http.request("POST", "/v1/images/generations", body_of(request), headers)
        with self._http.getresponse() as reply:
            answer = json.load(reply)
        return base64.b64decode(answer["data"][0]["b64_json"])

    def close(self) -> None:
        """Close both connections."""
        self._channel.close()
        self._http.close()


def lone_pairs(requests: Sequence[Request]) -> dict[str, list[float]]:
    """Seconds of each request over each door; which one comes first takes turns."""
    caller = LoneCaller()
    doors = {"grpc": caller.over_grpc, "http": caller.over_http}
    seconds: dict[str, list[float]] = {name: [] for name in doors}
    for number, request in enumerate(requests):
        images = set()
        for name in sorted(doors, reverse=bool(number % 2)):
            began = time.perf_counter()
            images.add(doors[name](request))
            seconds[name].append(time.perf_counter() - began)
        if len(images) != 1:
            raise RuntimeError("the doors returned different images for the same request")
    caller.close()
    return {name: each[WARM_UP_PAIRS:] for name, each in seconds.items()}


class ClosedLoop:
    """Callers over gRPC that each send the next request when they receive an image."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._requests = requests
        self._sent = 0
        self._ended: list[float] = []
        self._running = asyncio.create_task(self._run())

    async def images_per_second(self, images: int) -> float:
        """The rate of the next ``images`` once the loop has settled."""
        await asyncio.sleep(SETTLE_SECONDS)
        first = len(self._ended) + CALLERS
        while len(self._ended) <= first + images:
            if self._running.done():
                self._running.result()
            await asyncio.sleep(POLL_SECONDS)
        return images / (self._ended[first + images] - self._ended[first])

    async def close(self) -> None:
        """End the callers."""
        self._running.cancel()
        await asyncio.wait({self._running})

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(CALLERS):
                group.create_task(self._call())

    async def _call(self) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]  # A connection of its own.
        async with grpc.aio.insecure_channel(f"127.0.0.1:{PORT}", options) as channel:
            stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
            while True:
                request = self._requests[self._sent % len(self._requests)]
                self._sent += 1
                message = message_of(replace(request, seed=self._sent))
                await stub.Generate(message, metadata=(("authorization", bearer("load")),))
                self._ended.append(time.monotonic())


@asynccontextmanager
async def waiting_streams(count: int, request: Request) -> AsyncIterator[None]:
    """``count`` streams of events over HTTP that stay idle: their jobs wait in the queue.

    Raises ``RuntimeError`` if one was rejected, received an event, or ended.
    """
    streams = []
    try:
        for number in range(count):
            reader, writer = await asyncio.open_connection("127.0.0.1", HTTP_PORT)
            streams.append((reader, writer))
            body = body_of(request, stream=True)
            # Jobs are cancelled with their last stream, so a key can name the next one.
            key = f"{request.index}-{number // STREAMS_OF_A_JOB}"
            head = (
                "POST /v1/images/generations HTTP/1.1",
                "Host: localhost",
                "Content-Type: application/json",
                f"Content-Length: {len(body)}",
                f"Idempotency-Key: {key}",
                f"Authorization: {bearer('patient')}",
            )
            writer.write("\r\n".join((*head, "\r\n")).encode() + body)
        for reader, _ in streams:
            answer = await reader.readuntil(b"\r\n\r\n")
            if not answer.startswith(b"HTTP/1.1 200 "):
                raise RuntimeError(f"a stream was rejected: {answer.splitlines()[0]!r}")
        yield
        for reader, _ in streams:
            await _check_silent(reader)
    finally:
        for _, writer in streams:
            writer.close()
        await asyncio.gather(*(w.wait_closed() for _, w in streams), return_exceptions=True)


async def _check_silent(reader: asyncio.StreamReader) -> None:
    """Raise ``RuntimeError`` if a stream has ended, or has brought more than comments."""
    while True:
        try:
            async with asyncio.timeout(0.001):
                line = await reader.readline()
        except TimeoutError:
            return
        if not line:
            raise RuntimeError("a stream ended")
        if line.startswith((b"event:", b"data:")):
            raise RuntimeError(f"a stream was not idle: {line[:80]!r}")


async def closed_rounds(options: argparse.Namespace) -> dict[str, list[float]]:
    """Images/s of the closed loop in rounds with and without idle streams, in turns."""
    load = ClosedLoop(uniform(mixed(200, options.seed), STEPS, 4.0))
    patient = uniform(mixed(options.rounds, options.seed + 1), PATIENT_STEPS, 4.0)
    rates: dict[str, list[float]] = {"without": [], "with": []}
    await load.images_per_second(options.images)  # Warms up.
    for number in range(options.rounds):
        for kind in sorted(rates, reverse=bool(number % 2)):
            if kind == "with":
                request = replace(patient[number], index=number)
                async with waiting_streams(options.streams, request):
                    rates[kind].append(await load.images_per_second(options.images))
            else:
                rates[kind].append(await load.images_per_second(options.images))
        print(f"round {number}: {rates['without'][-1]:.2f}, {rates['with'][-1]:.2f}", flush=True)
    await load.close()
    return rates


def measure(options: argparse.Namespace) -> Measurement:
    """Both questions, to one server."""
    with server(options.model):
        requests = uniform(mixed(options.pairs + WARM_UP_PAIRS, options.seed), LONE_STEPS, 4.0)
        lone = lone_pairs(requests)
        print(f"lone requests: {len(lone['http'])} pairs", flush=True)
        closed = asyncio.run(closed_rounds(options))
    return Measurement(
        figures={"lone": lone, "closed": closed},
        model={"id": options.model or "demo"},
        settings={"callers": CALLERS, "steps": STEPS, "lone_steps": LONE_STEPS},
    )


def lone_ratio(results: Results) -> Median:
    """Seconds over HTTP by those over gRPC, of the same request."""
    seconds: Mapping[str, list[float]] = results.figures["lone"]
    pairs = zip(seconds["http"], seconds["grpc"], strict=True)
    return bootstrap_median([over_http / over_grpc for over_http, over_grpc in pairs])


def closed_ratio(results: Results) -> Median:
    """Images/s with idle streams by those without, of the same round."""
    rates: Mapping[str, list[float]] = results.figures["closed"]
    rounds = zip(rates["with"], rates["without"], strict=True)
    return bootstrap_median([beside / alone for beside, alone in rounds])


def goals(results: Results) -> list[Goal]:
    """What the door may cost."""
    lone, closed = lone_ratio(results), closed_ratio(results)
    streams = results.settings["streams"]
    return [
        Goal(
            "seconds of a lone request over HTTP, against gRPC",
            lone.value,
            1.03,
            False,
            (lone.low, lone.high),
            is_cost=True,
        ),
        Goal(
            f"images/s of the closed loop beside {streams} idle streams, against none",
            closed.value,
            0.98,
            True,
            (closed.low, closed.high),
            is_cost=True,
        ),
    ]


def describe(results: Results) -> list[str]:
    """The parts of the section."""
    settings, figures = results.settings, results.figures
    lone = {name: statistics.median(each) * 1000 for name, each in figures["lone"].items()}
    closed = {name: statistics.median(each) for name, each in figures["closed"].items()}
    return [
        f"A lone request of {settings['lone_steps']} steps over each door of one server, "
        f"{settings['pairs']} pairs in turns; the time ends when the caller has the bytes of the "
        f"image. Then a closed loop of {settings['callers']} callers over gRPC, "
        f"{settings['steps']} steps each, in {settings['rounds']} pairs of rounds of "
        f"{settings['images']} images, with and without {settings['streams']} streams of "
        "events over HTTP whose jobs wait in the queue with a lower priority. A round begins "
        f"{SETTLE_SECONDS:.0f} s after the streams were opened or closed. Ratios are of the same "
        "pair; intervals are 95 % of the median.",
        goals_table("ratio", goals(results), "×"),
        table(
            ["medians", "gRPC", "HTTP"],
            [["lone request, ms", f"{lone['grpc']:.1f}", f"{lone['http']:.1f}"]],
        ),
        table(
            ["medians", "without streams", "with streams"],
            [["closed loop, images/s", f"{closed['without']:.2f}", f"{closed['with']:.2f}"]],
        ),
    ]


BENCHMARK = Benchmark(
    name="http",
    title="HTTP beside gRPC",
    command="make bench-http",
    amounts={
        "pairs": Amount(200, 4, "lone requests over each door"),
        "rounds": Amount(80, 2, "pairs of rounds of the closed loop"),
        "images": Amount(60, 16, "of a round"),
        "streams": Amount(200, 50, "idle streams of events"),
        "seed": Amount(0, 0, "of the workload"),
    },
    measure=measure,
    describe=describe,
    goals=goals,
)
