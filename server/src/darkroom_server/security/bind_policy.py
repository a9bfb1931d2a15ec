"""Bind policy: an address that other machines can reach needs TLS or ``--insecure``."""

import ipaddress
import socket

import structlog

from darkroom_server.core.errors import StartupError

log = structlog.get_logger(__name__)


def check_bind_policy(
    host: str, *, tls: bool, tokens: bool, insecure: bool, flag: str = "--host"
) -> None:
    """Raise ``StartupError`` for plaintext on a network address, unless ``insecure`` is set.

    With ``insecure``, log a warning instead. ``flag`` is the one that sets ``host``.
    """
    if tls or is_loopback(host, flag):
        return
    if not insecure:
        raise StartupError(
            f"{flag} {host} accepts calls from other machines in plaintext: set --tls-cert and "
            "--tls-key, or --insecure if something else protects the network"
        )
    risk = "pictures and prompts" if not tokens else "pictures, prompts and tokens"
    log.warning("insecure", host=host, why=f"no TLS: {risk} travel in plaintext")


def is_loopback(host: str, flag: str = "--host") -> bool:
    """Return whether only this machine can reach ``host``; raises ``StartupError``."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise StartupError(f"{flag} {host}: no such address: {error.strerror}") from None
    return all(ipaddress.ip_address(str(address[0])).is_loopback for *_, address in found)
