"""From a client's settings to its gRPC channels.

There are two. Calls that begin jobs go over the checked one, to servers whose health says that they
take jobs; gRPC fails them itself where there is none, and then they go over the plain one, to hear
the server's own reason. All other calls go over the plain one, for a server that drains is still
asked about its jobs. The channels differ in nothing that matters to a connection, so that gRPC
makes one to each server for both; with TLS, where it never does, the plain one has its own, made at
its first call.
"""

import ipaddress
import itertools
import json
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio

from darkroom_client._protocol.rpc_errors import RETRIED
from darkroom_client._settings import Settings
from darkroom_client._types.connection import TLS, Retry

HEALTH_SERVICE = "darkroom.v1.GenerationService"
"""The name whose health check says whether a server accepts jobs."""

JOB_STARTING_METHODS = (
    ("darkroom.v1.GenerationService", "Generate"),
    ("darkroom.v1.GenerationService", "SubmitGeneration"),
)
OTHER_METHODS = (
    ("darkroom.v1.GenerationService", "CancelGeneration"),
    ("darkroom.v1.GenerationService", "EstimateGeneration"),
    ("darkroom.v1.ModelService", "ListModels"),
    ("darkroom.v1.ModelService", "GetModel"),
    ("darkroom.v1.ServerService", "GetStatus"),
)
"""Unary methods that gRPC retries: each is in one of the two tables.

No streams: ``GenerationSession`` retries those, as it knows what has arrived. (With grpcio 1.85,
gRPC's own retries of a stream hung until its deadline if the server was shutting down.)"""

Options = tuple[tuple[str, str | int], ...]
Methods = tuple[tuple[str, str], ...]

_clients = itertools.count()


def open_channels(settings: Settings) -> tuple[grpc.Channel, grpc.Channel]:
    """The checked and the plain channel for blocking calls; each connects at its first call."""
    own = _own_connections()
    checked, plain = (channel_options(settings, checked=each) + own for each in (True, False))
    target = dial_target(settings.target)
    return _open(settings, target, checked), _open(settings, target, plain)


def open_async_channels(settings: Settings) -> tuple[grpc.aio.Channel, grpc.aio.Channel]:
    """As ``open_channels``, for the running event loop, which they belong to."""
    own = _own_connections()
    checked, plain = (channel_options(settings, checked=each) + own for each in (True, False))
    target = dial_target(settings.target)
    return _open_async(settings, target, checked), _open_async(settings, target, plain)


def open_direct_channel(settings: Settings, address: str) -> grpc.Channel:
    """A channel to ``address``, one of those of the settings' target, for blocking calls."""
    return _open(settings, address, direct_options(settings))


def open_direct_async_channel(settings: Settings, address: str) -> grpc.aio.Channel:
    """As ``open_direct_channel``, for the running event loop."""
    return _open_async(settings, address, direct_options(settings))


def _open(settings: Settings, target: str, options: Options) -> grpc.Channel:
    if (credentials := _credentials(settings.tls)) is None:
        return grpc.insecure_channel(target, options)
    return grpc.secure_channel(target, credentials, options)


def _open_async(settings: Settings, target: str, options: Options) -> grpc.aio.Channel:
    if (credentials := _credentials(settings.tls)) is None:
        return grpc.aio.insecure_channel(target, options)
    return grpc.aio.secure_channel(target, credentials, options)


def _own_connections() -> Options:
    """Something by which the two channels of a client differ from those of all other clients.

    Else gRPC has all clients of a process share what it knows of an address: a new one would be
    told that nobody answers there, by the failure that another one met before, for seconds.
    """
    return (("darkroom.client", next(_clients)),)


def dial_target(target: str) -> str:
    """``target`` as gRPC wants it: a plain host:port is looked up in DNS, all its addresses."""
    scheme, separator, rest = target.partition(":")
    plain = not separator or rest.isdecimal() or scheme.startswith("[")
    return f"dns:///{target}" if plain else target


def endpoints(target: str) -> list[str]:
    """Every "host:port" of ``target``; empty for a kind of target that has none."""
    scheme, _, rest = dial_target(target).partition(":")
    if scheme == "dns":
        # Not behind "dns://server/": that name server's answers may differ from this machine's.
        name = rest.removeprefix("///")
        return [] if "/" in name else [name]
    return rest.split(",") if scheme in ("ipv4", "ipv6") else []


def is_loopback(target: str) -> bool:
    """Whether every address of ``target`` is one of this machine alone."""
    hosts = [endpoint.rpartition(":")[0].strip("[]") for endpoint in endpoints(target)]
    return bool(hosts) and all(host == "localhost" or _is_loopback_ip(host) for host in hosts)


def _is_loopback_ip(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def channel_options(settings: Settings, *, checked: bool) -> Options:
    """What gRPC is told about every connection of a client, and how one channel uses them."""
    options: Options = (
        ("grpc.keepalive_time_ms", round(settings.keepalive.interval * 1000)),
        ("grpc.keepalive_timeout_ms", round(settings.keepalive.timeout * 1000)),
        ("grpc.max_receive_message_length", settings.max_reply_bytes),
        ("grpc.service_config", json.dumps(service_config(settings, checked=checked))),
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


def direct_options(settings: Settings) -> Options:
    """The options of a channel to one address of the target: the name stays the target's."""
    options = channel_options(settings, checked=False) + _own_connections()
    names = endpoints(settings.target)
    if len(names) == 1:
        options += (("grpc.default_authority", names[0]),)
        if settings.tls is not None and not settings.tls.server_name:
            host = names[0].rpartition(":")[0].strip("[]")
            options += (("grpc.ssl_target_name_override", host),)
    return options


def service_config(settings: Settings, *, checked: bool) -> dict[str, object]:
    """How calls are spread over the servers behind a name, and when they are tried again."""
    retry = settings.retry
    config: dict[str, object] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if checked:
        # No retries here: gRPC would spend them all on finding that no server is healthy. A call
        # that fails has its further tries over the plain channel.
        config["healthCheckConfig"] = {"serviceName": HEALTH_SERVICE}
    elif retry.attempts > 1:
        # What begins a job has had its first try over the checked channel.
        later = replace(
            retry,
            attempts=retry.attempts - 1,
            initial_backoff=min(retry.initial_backoff * retry.multiplier, retry.max_backoff),
        )
        kinds = [(OTHER_METHODS, retry), (JOB_STARTING_METHODS, later)]
        config["methodConfig"] = [_method_config(*kind) for kind in kinds if kind[1].attempts > 1]
        # After 50 failures more than successes, retries stop: a fleet that is down is left alone.
        config["retryThrottling"] = {"maxTokens": 100, "tokenRatio": 0.5}
    return config


def _method_config(methods: Methods, retry: Retry) -> dict[str, object]:
    policy = {
        "maxAttempts": retry.attempts,
        "initialBackoff": f"{retry.initial_backoff:.9f}s",
        "maxBackoff": f"{retry.max_backoff:.9f}s",
        "backoffMultiplier": retry.multiplier,
        "retryableStatusCodes": [code.name for code in RETRIED],
    }
    names = [{"service": service, "method": method} for service, method in methods]
    return {"name": names, "retryPolicy": policy}


def check_files(tls: TLS | None) -> None:
    """Raise ``OSError`` for a file that cannot be read, long before the first call needs it."""
    for file in (tls.ca, tls.cert, tls.key) if tls else ():
        if file is not None:
            Path(file).open("rb").close()


def _credentials(tls: TLS | None) -> grpc.ChannelCredentials | None:
    if tls is None:
        return None
    return grpc.ssl_channel_credentials(
        root_certificates=Path(tls.ca).read_bytes() if tls.ca else None,
        private_key=Path(tls.key).read_bytes() if tls.key else None,
        certificate_chain=Path(tls.cert).read_bytes() if tls.cert else None,
    )
