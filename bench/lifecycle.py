"""How soon a server is there, and how soon it is back: ``python -m bench.lifecycle``.

Starts a real server again and again: until it answers health checks, until it is ready, and, with
its engine killed, until it serves again. Writes ``bench/results`` and a part of
``docs/benchmarks.md``.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.lifecycle_page import page
from bench.machine import this_machine, versions
from bench.results import RESULTS, Results, save, today
from bench.sections import DOCS, write_section
from darkroom_client import Client

PORT = 50951
STATUS = health_pb2.HealthCheckResponse


@contextmanager
def server(port: int) -> Iterator[psutil.Popen]:
    """A server of the demo model, killed at the end."""
    flags = ["--port", str(port), "--metrics-port", "0", "--log-level", "error"]
    process = psutil.Popen([sys.executable, "-m", "darkroom_server", "serve", *flags])
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def until(port: int, service: str, status: int) -> None:
    """Wait until ``service`` has ``status``, from before the port is open."""
    # A short pause between attempts: what is measured takes tenths of a second.
    options = [(f"grpc.{name}_reconnect_backoff_ms", 10) for name in ("initial", "max", "min")]
    with grpc.insecure_channel(f"127.0.0.1:{port}", options) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        for response in stub.Watch(request, wait_for_ready=True):
            if response.status == status:
                return


def starts(count: int, port: int) -> dict[str, list[float]]:
    """Seconds from the start of a process to its first answer, to READY, and after a crash."""
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then write the results and the page."""
    parser = argparse.ArgumentParser(prog="bench.lifecycle", description=__doc__)
    parser.add_argument("--starts", type=int, default=10)
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--note", default="", help="a sentence for the page, on the circumstances")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args(arguments)
    figures = {"help": helps(options.starts), **starts(options.starts, options.port)}
    results = Results(
        bench="lifecycle",
        date=today(),
        machine=this_machine(),
        versions=versions(),
        model={"id": "demo"},
        settings={"starts": options.starts},
        figures=figures,
        note=options.note,
    )
    text = page(results)
    print(text)
    print(save(results, options.results).name)
    write_section("benchmarks.md", "Benchmarks", "lifecycle", text, options.docs)


if __name__ == "__main__":
    main()
