"""Checks the health of a server, for container probes."""

import ipaddress
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from darkroom_server.core.errors import StartupError
from darkroom_server.security.tls import own_credentials, read_pem
from darkroom_server.settings import Settings
from darkroom_server.settings.tls import tls_files

LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""The address to call for a server that listens on all addresses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The server to check.

    ``credentials``: None for plaintext. ``name``: the host name to expect in the certificate, None
    for that of the address. ``local``: ignore the proxy that the environment may name.
    """

    address: str
    credentials: grpc.ChannelCredentials | None = None
    name: str | None = None
    local: bool = False


def target_of(settings: Settings) -> Target:
    """Return the target for a server on this machine with these settings.

    Raises ``StartupError``.
    """
    network, files = settings.network, tls_files(settings.security)
    host = LOOPBACK.get(network.host, network.host)
    address = f"[{host}]:{network.port}" if ":" in host else f"{host}:{network.port}"
    if files is None:
        return Target(address=address, local=True)
    credentials, name = own_credentials(files)
    return Target(address=address, credentials=credentials, name=name, local=True)


def given_target(
    address: str,
    ca: str | None = None,
    cert: str | None = None,
    key: str | None = None,
    server_name: str | None = None,
) -> Target:
    """Return the target named on the command line; raises ``StartupError`` for unreadable files."""
    if ca is None:
        if cert or key or server_name:
            raise StartupError("healthcheck: --cert, --key and --server-name need --ca")
        return Target(address=address, local=_is_loopback(address))
    if (cert is None) != (key is None):
        raise StartupError("healthcheck: --cert and --key go together")
    credentials = grpc.ssl_channel_credentials(
        read_pem("--ca", ca),
        read_pem("--key", key) if key else None,
        read_pem("--cert", cert) if cert else None,
    )
    return Target(
        address=address, credentials=credentials, name=server_name, local=_is_loopback(address)
    )


def healthcheck(target: Target, service: str, timeout: float) -> tuple[bool, str]:
    """Return whether ``service`` is SERVING at ``target``, and one line that describes it.

    ``timeout`` is in seconds.
    """
    with _channel(target) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            status = stub.Check(request, timeout=timeout).status
        except grpc.RpcError as error:
            return False, f"{target.address}: {error.code().name}: {error.details()}"
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
    return status == health_pb2.HealthCheckResponse.SERVING, f"{target.address}: {name}"


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].rpartition("/")[2].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _channel(target: Target) -> grpc.Channel:
    options: list[tuple[str, str | int]] = []
    if target.local:
        options.append(("grpc.enable_http_proxy", 0))
    if target.credentials is None:
        return grpc.insecure_channel(target.address, options)
    if target.name:
        options.append(("grpc.ssl_target_name_override", target.name))
    return grpc.secure_channel(target.address, target.credentials, options)
