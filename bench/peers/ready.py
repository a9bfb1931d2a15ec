"""Whether a peer accepts requests, by its own health check."""

import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.peers.protocols import Wire
from bench.peers.servers.config import READY

PATHS = {Wire.LITSERVE: "/health", Wire.RAY: "/-/healthz", Wire.TRITON: "/v2/health/ready"}


def is_ready(wire: Wire, port: int, log: Path) -> bool:
    """One check; a server that prints ``READY`` must also have printed it."""
    if wire is Wire.GRPC:
        return _prints(log) or _serves(port)
    return (wire is Wire.LITSERVE or _prints(log)) and _answers(port, PATHS[wire])


def _prints(log: Path) -> bool:
    return READY in log.read_text(errors="replace").splitlines()


def _answers(port: int, path: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _serves(port: int) -> bool:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            response = stub.Check(health_pb2.HealthCheckRequest(), timeout=2)
        except grpc.RpcError:
            return False
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)
