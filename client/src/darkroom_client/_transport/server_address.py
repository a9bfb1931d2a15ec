"""From a server's id to its address, for a call that must reach one server behind a shared name."""

import re
import socket
import threading
from queue import Empty, SimpleQueue

from darkroom_client._settings import split_targets
from darkroom_client._transport.channels import endpoints

_ENDPOINT = re.compile(r"\[?([^][]+?)]?:([0-9]{1,5})")


def server_address(server_id: str, target: str, seconds: float) -> str | None:
    """The address to dial for the server ``server_id``, such as "ipv4:10.0.0.7:50051".

    None unless it is one of several addresses that ``target`` resolves to. So a call, and its
    token, goes to no other server than before. None for several targets: the channel to those knows
    which server has a job. None, too, if the names do not resolve within
    ``seconds``.
    """
    if not server_id or len(split_targets(target)) > 1:
        return None
    found: SimpleQueue[str | None] = SimpleQueue()
    # A daemon thread: getaddrinfo has no time limit, and must not delay the end of the process.
    threading.Thread(target=lambda: found.put(_match(server_id, target)), daemon=True).start()
    try:
        return found.get(timeout=seconds)
    except Empty:
        return None


def _match(server_id: str, target: str) -> str | None:
    shared = set[str]().union(*(_resolve(endpoint) for endpoint in endpoints(target)))
    if len(shared) < 2:
        return None  # Any call gets there.
    matches = sorted(shared & _resolve(server_id))
    return matches[0] if matches else None


def _resolve(endpoint: str) -> set[str]:
    """Every address of "host:port", in gRPC's form; none if it does not resolve."""
    parts = _ENDPOINT.fullmatch(endpoint)
    if parts is None:
        return set()
    try:
        found = socket.getaddrinfo(parts[1], int(parts[2]), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return set()
    addresses = set()
    for family, _, _, _, address in found:
        host, port = str(address[0]), address[1]
        ipv6 = family is socket.AF_INET6
        addresses.add(f"ipv6:[{host}]:{port!s}" if ipv6 else f"ipv4:{host}:{port!s}")
    return addresses
