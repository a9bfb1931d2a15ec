"""From a client's settings to its gRPC channels.

Calls that last as long as a job go over a pair of channels. Those that start jobs go over the
checked channel, to servers whose health says that they accept jobs. If there is none, gRPC fails
the call, and the next try goes over the plain channel, to get the server's own reason. Watches go
over the plain channel: a draining server still answers calls about its jobs. The two have equal
connection options, so gRPC shares one connection to each server between them. With TLS gRPC shares
none: the plain channel opens its own at its first call. With several targets, each of these
channels consists of one for each target.

A server limits the streams of a connection (about 100), and gRPC queues further calls in silence.
So a client opens a further pair before that (``CALLS_PER_PAIR``), and short calls have a channel
and a connection of their own.
"""

import ipaddress
import itertools
import json
from pathlib import Path

import grpc
import grpc.aio

from darkroom_client._protocol.balancing import Balancer
from darkroom_client._settings import Settings, split_targets
from darkroom_client._transport.balanced import BalancedAsyncChannel, BalancedChannel
from darkroom_client._transport.service_config import service_config
from darkroom_client._types.connection import TLS

CALLS_PER_PAIR = 90
"""Calls at a time on one pair of channels. A server limits the streams of a connection to about
100, and the health check of the checked channel is one of them."""

Options = tuple[tuple[str, str | int], ...]

_clients = itertools.count()


def new_balancer(settings: Settings) -> Balancer | None:
    """What chooses among several targets; None for a single one."""
    targets = settings.targets
    return Balancer(len(targets)) if len(targets) > 1 else None


def open_pair(
    settings: Settings, balancer: Balancer | None
) -> tuple[grpc.Channel | BalancedChannel, grpc.Channel | BalancedChannel]:
    """A checked and a plain channel for blocking calls; each connects at its first call."""
    own = _own_connections()
    checked, plain = (channel_options(settings, checked=each) + own for each in (True, False))
    return _open_all(settings, checked, balancer), _open_all(settings, plain, balancer)


def open_async_pair(
    settings: Settings, balancer: Balancer | None
) -> tuple[grpc.aio.Channel | BalancedAsyncChannel, grpc.aio.Channel | BalancedAsyncChannel]:
    """Like ``open_pair``, for the running event loop, which they belong to."""
    own = _own_connections()
    checked, plain = (channel_options(settings, checked=each) + own for each in (True, False))
    return _open_all_async(settings, checked, balancer), _open_all_async(settings, plain, balancer)


def open_control_channel(
    settings: Settings, balancer: Balancer | None
) -> grpc.Channel | BalancedChannel:
    """A channel for short blocking calls, with connections of its own."""
    options = channel_options(settings, checked=False) + _own_connections()
    return _open_all(settings, options, balancer)


def open_async_control_channel(
    settings: Settings, balancer: Balancer | None
) -> grpc.aio.Channel | BalancedAsyncChannel:
    """Like ``open_control_channel``, for the running event loop."""
    options = channel_options(settings, checked=False) + _own_connections()
    return _open_all_async(settings, options, balancer)


def open_direct_channel(settings: Settings, address: str) -> grpc.Channel:
    """A channel for blocking calls to ``address``, which is one of the target's addresses."""
    return _open(settings, address, direct_options(settings))


def open_direct_async_channel(settings: Settings, address: str) -> grpc.aio.Channel:
    """Like ``open_direct_channel``, for the running event loop."""
    return _open_async(settings, address, direct_options(settings))


def _open_all(
    settings: Settings, options: Options, balancer: Balancer | None
) -> grpc.Channel | BalancedChannel:
    channels = [_open(settings, dial_target(each), options) for each in settings.targets]
    return channels[0] if balancer is None else BalancedChannel(channels, balancer)


def _open_all_async(
    settings: Settings, options: Options, balancer: Balancer | None
) -> grpc.aio.Channel | BalancedAsyncChannel:
    channels = [_open_async(settings, dial_target(each), options) for each in settings.targets]
    return channels[0] if balancer is None else BalancedAsyncChannel(channels, balancer)


def _open(settings: Settings, target: str, options: Options) -> grpc.Channel:
    if (credentials := _credentials(settings.tls)) is None:
        return grpc.insecure_channel(target, options)
    return grpc.secure_channel(target, credentials, options)


def _open_async(settings: Settings, target: str, options: Options) -> grpc.aio.Channel:
    if (credentials := _credentials(settings.tls)) is None:
        return grpc.aio.insecure_channel(target, options)
    return grpc.aio.secure_channel(target, credentials, options)


def is_connected(channel: grpc.Channel | BalancedChannel) -> bool:
    """Whether ``channel`` has a connection now; False if it is closed.

    gRPC's asyncio channels have a method for this, the blocking ones do not: only ``subscribe``,
    whose thread goes on after ``unsubscribe`` and fails if the channel is closed meanwhile. So this
    calls what the asyncio ones call.
    """
    if isinstance(channel, BalancedChannel):
        return any(map(is_connected, channel.channels))
    state: int
    try:
        state = channel._channel.check_connectivity_state(False)  # type: ignore[attr-defined]
    except ValueError:
        return False
    ready: int = grpc.ChannelConnectivity.READY.value[0]
    return state == ready


def _own_connections() -> Options:
    """An option that separates the connections of its channels from those of all others.

    Without it all channels of a process share gRPC's subchannels: they would share the server's
    limit of streams, and a new client would fail for seconds because an earlier client's
    connection attempt to that address failed.
    """
    return (("darkroom.client", next(_clients)),)


def dial_target(target: str) -> str:
    """``target`` in gRPC's form: a plain host:port is resolved by DNS to all its addresses."""
    scheme, separator, rest = target.partition(":")
    plain = not separator or rest.isdecimal() or scheme.startswith("[")
    return f"dns:///{target}" if plain else target


def endpoints(target: str) -> list[str]:
    """Every "host:port" of ``target``; empty for a kind of target that has none."""
    if len(targets := split_targets(target)) > 1:
        return targets
    scheme, _, rest = dial_target(target).partition(":")
    if scheme == "dns":
        # None for "dns://server/name": that name server may answer differently from this machine.
        name = rest.removeprefix("///")
        return [] if "/" in name else [name]
    return rest.split(",") if scheme in ("ipv4", "ipv6") else []


def is_loopback(target: str) -> bool:
    """Whether every address of ``target`` is a loopback address."""
    hosts = [endpoint.rpartition(":")[0].strip("[]") for endpoint in endpoints(target)]
    return bool(hosts) and all(host == "localhost" or _is_loopback_ip(host) for host in hosts)


def _is_loopback_ip(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def channel_options(settings: Settings, *, checked: bool) -> Options:
    """The options of a channel: its connections, and how it uses them."""
    options: Options = (
        ("grpc.keepalive_time_ms", round(settings.keepalive.interval * 1000)),
        ("grpc.keepalive_timeout_ms", round(settings.keepalive.timeout * 1000)),
        ("grpc.max_receive_message_length", settings.max_reply_bytes),
        ("grpc.service_config", json.dumps(service_config(checked=checked))),
        # To notice a new server within seconds: gRPC's own backoff grows to two minutes.
        ("grpc.initial_reconnect_backoff_ms", 250),
        ("grpc.max_reconnect_backoff_ms", 5000),
        # In fact the time limit of one connection attempt.
        ("grpc.min_reconnect_backoff_ms", 5000),
    )
    if is_loopback(settings.target):
        # A proxy from the environment would take this address for its own machine.
        options += (("grpc.enable_http_proxy", 0),)
    if settings.tls is not None and settings.tls.server_name:
        options += (("grpc.ssl_target_name_override", settings.tls.server_name),)
    return options


def direct_options(settings: Settings) -> Options:
    """The options of a channel to one address of the target; it keeps the target's name."""
    options = channel_options(settings, checked=False) + _own_connections()
    names = endpoints(settings.target)
    if len(names) == 1:
        options += (("grpc.default_authority", names[0]),)
        if settings.tls is not None and not settings.tls.server_name:
            host = names[0].rpartition(":")[0].strip("[]")
            options += (("grpc.ssl_target_name_override", host),)
    return options


def check_files(tls: TLS | None) -> None:
    """Raise ``OSError`` for a file that cannot be read, before the first call needs it."""
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
