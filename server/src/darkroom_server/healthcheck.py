"""Asks a server for its health, as a container's probe does."""

from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from darkroom_server.settings import Network

LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""What listens on every address is asked on this one."""


def target_of(network: Network) -> str:
    """The address of a server that runs with these settings."""
    host = LOOPBACK.get(network.host, network.host)
    return f"[{host}]:{network.port}" if ":" in host else f"{host}:{network.port}"


def healthcheck(target: str, service: str, timeout: float) -> tuple[bool, str]:
    """Whether ``service`` is SERVING at ``target``, and a line that says so."""
    with grpc.insecure_channel(target) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            status = stub.Check(request, timeout=timeout).status
        except grpc.RpcError as error:
            return False, f"{target}: {error.code().name}: {error.details()}"
    serving = status == health_pb2.HealthCheckResponse.SERVING
    return serving, f"{target}: {health_pb2.HealthCheckResponse.ServingStatus.Name(status)}"
