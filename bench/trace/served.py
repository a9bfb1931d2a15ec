"""The trace over the real wire, to the real server with the demo model's copies."""

import asyncio
import io
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2
from PIL import Image

from bench.micro.lifecycle import until
from bench.peers.process import free_port
from bench.peers.registry import WORK
from bench.trace.figures import Swaps, read_swaps
from bench.trace.requests import Kind, TraceRequest
from bench.trace.server import ServerConfig
from bench.workload.arrivals import Answer, Outcome
from darkroom.v1 import generation_pb2, generation_pb2_grpc, image_pb2, types_pb2

CHANNELS = 8

LORAS = ("night", "outline")
"""The demo model's adapters; a request with more of them in the trace has these two."""

PROMPT = "a small red circle"
LONE_ROUNDS = 5
PATIENCE_SECONDS = 720.0


@contextmanager
def server(config: ServerConfig) -> Iterator[None]:
    """A server that is ready, in a process of its own, stopped at the end."""
    Path(config.swaps).unlink(missing_ok=True)
    process = psutil.Popen([sys.executable, "-m", "bench.trace.server", *config.arguments()])
    try:
        until(config.port, "", health_pb2.HealthCheckResponse.SERVING)
        yield
    finally:
        process.terminate()
        process.wait()


class Callers:
    """Sends requests for squares of ``side`` pixels over several connections."""

    def __init__(self, port: int, side: int) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._side = side
        self._channels = [
            grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) for _ in range(CHANNELS)
        ]
        self._stubs: list[Any] = [
            generation_pb2_grpc.GenerationServiceStub(channel) for channel in self._channels
        ]
        self._picture = image_pb2.ImageInput(data=picture(side))

    async def close(self) -> None:
        """Close the connections."""
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def play(self, requests: Sequence[TraceRequest]) -> list[Answer]:
        """See ``play``."""
        return await play(requests, self._call)

    async def alone(self, model: str, images: Sequence[int], steps: int) -> dict[int, float]:
        """Seconds of a lone request with its model in memory, by its number of images."""
        found = {}
        for count in images:
            seconds = []
            for number in range(LONE_ROUNDS + 1):
                request = TraceRequest(0, "", steps, 7.5, seed=number, images=count, model=model)
                began = time.monotonic()
                await self._must(request)
                seconds.append(time.monotonic() - began)
            found[count] = statistics.median(seconds[1:])
        return found

    async def _must(self, request: TraceRequest) -> None:
        if (outcome := await self._call(request)) is not Outcome.IMAGE:
            raise RuntimeError(f"a request ended as {outcome}")

    async def _call(self, request: TraceRequest) -> Outcome:
        stub = self._stubs[request.index % CHANNELS]
        try:
            answer = await stub.Generate(self._message(request), timeout=PATIENCE_SECONDS)
        except grpc.aio.AioRpcError as error:
            print(f"request {request.index}: {error.code()}: {error.details()}", flush=True)
            return Outcome.FAILED
        complete = len(answer.images) == request.images and all(i.data for i in answer.images)
        return Outcome.IMAGE if complete else Outcome.FAILED

    def _message(self, request: TraceRequest) -> generation_pb2.GenerateRequest:
        # With strength 1 an image takes the same steps as one from text.
        image = self._picture if request.kind is not Kind.TEXT else None
        return generation_pb2.GenerateRequest(
            model=request.model,
            prompt=PROMPT,
            width=self._side,
            height=self._side,
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            seed=request.seed,
            image_count=request.images,
            format=types_pb2.IMAGE_FORMAT_PNG,
            image=image,
            mask_image=self._picture if request.kind is Kind.INPAINT else None,
            strength=None if image is None else 1.0,
            loras=[generation_pb2.Lora(id=id) for id in LORAS[: request.loras]],
        )


async def play(
    requests: Sequence[TraceRequest], call: Callable[[TraceRequest], Awaitable[Outcome]]
) -> list[Answer]:
    """Send each request at its arrival, by ``call``."""
    began = time.monotonic()

    async def send(request: TraceRequest) -> Answer:
        await asyncio.sleep(began + request.arrival - time.monotonic())
        outcome = await call(request)
        answer = Answer.of(request, request.arrival, time.monotonic() - began)
        return replace(answer, outcome=outcome)

    return await asyncio.gather(*map(send, requests))


def picture(side: int) -> bytes:
    """The PNG file of a white square."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), "white").save(file, "PNG")
    return file.getvalue()


def serve_trace(
    requests: Sequence[TraceRequest], config: ServerConfig, side: int
) -> tuple[list[Answer], Swaps]:
    """Serve ``requests`` with a new server; returns the answers and what the loads cost."""

    async def play() -> list[Answer]:
        callers = Callers(config.port, side)
        try:
            return await callers.play(requests)
        finally:
            await callers.close()

    with server(config):
        answers = asyncio.run(play())
    return answers, read_swaps(Path(config.swaps))


def measure_alone(
    config: ServerConfig, side: int, model: str, images: Sequence[int], steps: int
) -> dict[int, float]:
    """The seconds of a lone request for a resident model, by its number of images."""

    async def measure() -> dict[int, float]:
        callers = Callers(config.port, side)
        try:
            return await callers.alone(model, images, steps)
        finally:
            await callers.close()

    with server(replace(config, load_scale=0.0)):
        return asyncio.run(measure())


def config_of(folder: Path, name: str, **fields: Any) -> ServerConfig:
    """The configuration of a run called ``name``."""
    WORK.mkdir(parents=True, exist_ok=True)
    return ServerConfig(
        port=free_port(), models=str(folder), swaps=str(WORK / f"trace-{name}.json"), **fields
    )
