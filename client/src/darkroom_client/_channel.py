"""From a client's settings to a gRPC channel."""

import ipaddress
import json
from pathlib import Path

import grpc
import grpc.aio

from darkroom_client._connection import TLS
from darkroom_client._settings import Settings

RETRIED = (
    ("darkroom.v1.GenerationService", "Generate"),
    ("darkroom.v1.GenerationService", "SubmitGeneration"),
    ("darkroom.v1.GenerationService", "CancelGeneration"),
    ("darkroom.v1.GenerationService", "EstimateGeneration"),
    ("darkroom.v1.ModelService", "ListModels"),
    ("darkroom.v1.ModelService", "GetModel"),
    ("darkroom.v1.ServerService", "GetStatus"),
)
"""Calls that gRPC tries again. Not streams: ``Following`` does that, knowing what they told before.
(And a stream that meets a server which is going away was seen to hang in gRPC's own retries until
its deadline, with grpcio 1.85.)"""

Options = tuple[tuple[str, str | int], ...]


def open_channel(settings: Settings) -> grpc.Channel:
    """A channel for blocking calls; it connects at the first one."""
    target, options = dial_target(settings.target), channel_options(settings)
    if settings.tls is None:
        return grpc.insecure_channel(target, options)
    return grpc.secure_channel(target, _credentials(settings.tls), options)


def open_async_channel(settings: Settings) -> grpc.aio.Channel:
    """A channel that belongs to the running event loop; it connects at the first call."""
    target, options = dial_target(settings.target), channel_options(settings)
    if settings.tls is None:
        return grpc.aio.insecure_channel(target, options)
    return grpc.aio.secure_channel(target, _credentials(settings.tls), options)


def dial_target(target: str) -> str:
    """``target`` as gRPC wants it: a plain host:port is looked up in DNS, all its addresses."""
    scheme, separator, rest = target.partition(":")
    plain = not separator or rest.isdecimal() or scheme.startswith("[")
    return f"dns:///{target}" if plain else target


def is_loopback(target: str) -> bool:
    """Whether every address of ``target`` is one of this machine alone."""
    rest = dial_target(target)
    for scheme in ("dns:", "ipv4:", "ipv6:"):
        rest = rest.removeprefix(scheme)
    hosts = [each.rpartition(":")[0].strip("[]") for each in rest.rpartition("/")[2].split(",")]
    return all(host == "localhost" or _is_loopback_ip(host) for host in hosts)


def _is_loopback_ip(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def channel_options(settings: Settings) -> Options:
    """What gRPC is told about every connection of a client."""
    options: Options = (
        ("grpc.keepalive_time_ms", round(settings.keepalive.interval * 1000)),
        ("grpc.keepalive_timeout_ms", round(settings.keepalive.timeout * 1000)),
        ("grpc.max_receive_message_length", settings.max_reply_bytes),
        ("grpc.service_config", json.dumps(service_config(settings))),
        # A server that comes up is noticed within seconds; gRPC's own waits grow to two minutes.
        ("grpc.initial_reconnect_backoff_ms", 250),
        ("grpc.max_reconnect_backoff_ms", 5000),
        # How long one attempt to connect may take, its name notwithstanding.
        ("grpc.min_reconnect_backoff_ms", 5000),
    )
    if is_loopback(settings.target):
        # The proxy that the environment may name means itself by this address.
        options += (("grpc.enable_http_proxy", 0),)
    if settings.tls is not None and settings.tls.server_name:
        options += (("grpc.ssl_target_name_override", settings.tls.server_name),)
    return options


def service_config(settings: Settings) -> dict[str, object]:
    """How calls are spread over the servers behind a name, and when they are tried again."""
    retry = settings.retry
    # Not by health: gRPC would fail every call where no server is healthy, without the reason that
    # the server has, and one that drains must be reached to follow a job or to cancel it.
    config: dict[str, object] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if retry.attempts > 1:
        policy = {
            "maxAttempts": retry.attempts,
            "initialBackoff": f"{retry.initial_backoff:.9f}s",
            "maxBackoff": f"{retry.max_backoff:.9f}s",
            "backoffMultiplier": retry.multiplier,
            # A server that closes its port drops what arrives at that moment, as CANCELLED. A job
            # that somebody cancelled is CANCELLED too, but with a trailer that forbids retries.
            "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
        }
        names = [{"service": service, "method": method} for service, method in RETRIED]
        config["methodConfig"] = [{"name": names, "retryPolicy": policy}]
        # After 50 failures more than successes, retries stop: a fleet that is down is left alone.
        config["retryThrottling"] = {"maxTokens": 100, "tokenRatio": 0.5}
    return config


def _credentials(tls: TLS) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        root_certificates=Path(tls.ca).read_bytes() if tls.ca else None,
        private_key=Path(tls.key).read_bytes() if tls.key else None,
        certificate_chain=Path(tls.cert).read_bytes() if tls.cert else None,
    )
