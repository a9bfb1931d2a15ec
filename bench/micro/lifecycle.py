"""The time until a server is ready after a start, and after a crash of its engine.

Starts a real server repeatedly: until it answers health checks, until it is ready, and, with its
engine killed, until it is ready again.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.report.benchmark import Amount, Benchmark, Measurement
from bench.report.markdown import table
from bench.report.results import Results
from bench.report.statistics import quantile
from darkroom_client import Client

PORT = 50951
STATUS = health_pb2.HealthCheckResponse
ROWS = {
    "help": "`--help`",
    "answers": "start to the first answer to a health check",
    "ready": "start to READY, the demo model loaded and warmed up",
    "recovers": "engine killed (SIGKILL) to READY again",
}


@contextmanager
def server(port: int) -> Iterator[psutil.Popen]:
    """A server of the demo model, stopped at the end."""
    flags = ["--port", str(port), "--metrics-port", "0", "--log-level", "error"]
    process = psutil.Popen([sys.executable, "-m", "darkroom_server", "serve", *flags])
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def until(port: int, service: str, status: int) -> None:
    """Wait until ``service`` has ``status``; the port may not be open yet."""
    # Reconnect quickly: the measured times are tenths of a second.
    options = [(f"grpc.{name}_reconnect_backoff_ms", 10) for name in ("initial", "max", "min")]
    with grpc.insecure_channel(f"127.0.0.1:{port}", options) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        for response in stub.Watch(request, wait_for_ready=True):
            if response.status == status:
                return


def starts(count: int, port: int) -> dict[str, list[float]]:
    """Seconds from a start to the first answer and to READY, and from a crash to READY."""
    found: dict[str, list[float]] = {"answers": [], "ready": [], "recovers": []}
    for _ in range(count):
        began = time.monotonic()
        with server(port) as process:
            until(port, "liveness", STATUS.SERVING)
            found["answers"].append(time.monotonic() - began)
            until(port, "", STATUS.SERVING)
            found["ready"].append(time.monotonic() - began)
            with Client(f"127.0.0.1:{port}") as client:
                client.generate("a small heart", steps=2)
            (engine,) = process.children()
            engine.kill()
            killed = time.monotonic()
            until(port, "", STATUS.NOT_SERVING)
            until(port, "", STATUS.SERVING)
            found["recovers"].append(time.monotonic() - killed)
    return found


def helps(count: int) -> list[float]:
    """Seconds that ``--help`` takes."""
    seconds = []
    for _ in range(count):
        began = time.monotonic()
        command = [sys.executable, "-m", "darkroom_server", "serve", "--help"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.monotonic() - began)
    return seconds


def measure(options: argparse.Namespace) -> Measurement:
    """Start servers, and ``--help``, that many times."""
    return Measurement(
        figures={"help": helps(options.starts), **starts(options.starts, PORT)},
        model={"id": "demo"},
    )


def describe(results: Results) -> list[str]:
    """The table of the section."""
    rows = [
        [
            label,
            *(f"{quantile(results.figures[name], share) * 1000:.0f}" for share in (0.0, 0.5, 1.0)),
        ]
        for name, label in ROWS.items()
    ]
    return [
        f"Milliseconds, {results.settings['starts']} times each.",
        table(["", "minimum", "median", "maximum"], rows),
    ]


BENCHMARK = Benchmark(
    name="lifecycle",
    title="Start and recovery",
    command="python -m bench.micro lifecycle",
    amounts={"starts": Amount(10, 1, "starts of a server")},
    measure=measure,
    describe=describe,
)
