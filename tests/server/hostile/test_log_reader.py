"""A reader of the server's log that stalls."""

import asyncio
import signal
import time
import urllib.request
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from darkroom.v1 import generation_pb2, generation_pb2_grpc
from tests.server.app.process import start

REQUESTS = 700
LONG = generation_pb2.GenerateRequest(prompt="a" * 8000, steps=0)
"""Rejected, and logged with its prompt: 8 kB each, more than the pipe and the queue hold."""


def dropped_lines(metrics: str) -> float:
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=10) as page:
        text = page.read().decode()
    (value,) = (
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "darkroom_log_lines_dropped_total"
    )
    return float(value)


async def flood(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        for _ in range(REQUESTS // 50):
            calls = [stub.Generate(LONG) for _ in range(50)]
            codes = await asyncio.gather(*(call.code() for call in calls))
            assert set(codes) == {grpc.StatusCode.INVALID_ARGUMENT}
        health: Any = health_pb2_grpc.HealthStub(channel)
        began = time.monotonic()
        await health.Check(health_pb2.HealthCheckRequest(service="liveness"), timeout=5)
        assert time.monotonic() - began < 1.0


async def test_a_log_reader_that_stalls_delays_no_call_and_no_exit() -> None:
    with start("--log-prompts", "--log-format", "json", auto=True) as process:
        serving = process.until("serving")  # Nothing reads the log from now on.
        async with asyncio.timeout(30):
            await flood(serving["address"])
        assert await asyncio.to_thread(dropped_lines, serving["metrics"]) > 0
        process.send(signal.SIGTERM)
        assert await asyncio.wait_for(asyncio.to_thread(process.wait), 20) == 0
