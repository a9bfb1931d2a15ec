"""Whether others than this machine reach the server, and what must then be so."""

import ipaddress
import socket

import structlog

from darkroom_server.core.errors import StartupError

log = structlog.get_logger(__name__)


def check_bind_policy(host: str, *, tls: bool, tokens: bool, insecure: bool) -> None:
    """Raise ``StartupError`` where calls would come readable over a network, unasked for.

    With ``insecure`` that is what the operator wants, and is logged.
    """
    if tls or is_loopback(host):
        return
    if not insecure:
        raise StartupError(
            f"--host {host} lets other machines in, and everything would travel readable: give "
            "--tls-cert and --tls-key, or say --insecure where something else protects the network"
        )
    risk = "pictures and prompts" if not tokens else "pictures, prompts and tokens"
    log.warning("insecure", host=host, why=f"no TLS: {risk} are readable on the way here")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on ``host``; raises ``StartupError``."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise StartupError(f"--host {host}: no such address: {error.strerror}") from None
    return all(ipaddress.ip_address(str(address[0])).is_loopback for *_, address in found)
