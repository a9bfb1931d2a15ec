"""Rules against web pages that use a browser inside the network to reach the server."""

import re
import socket
from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from urllib.parse import urlsplit

from darkroom_server.http.errors import HttpError

ANY_NAME = "*"

HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")

ALLOWED_METHODS = "GET, POST, OPTIONS"
EXPOSED = "x-request-id, darkroom-request-id, retry-after, retry-after-ms, x-should-retry"
PREFLIGHT_SECONDS = 600


class BrowserRules:
    """Checks ``Host`` and ``Origin``.

    ``hosts``: names by which callers may address the server, besides its own; "*" is every name.
    ``origins``: origins whose pages may call it, besides its own.

    An IP address as ``Host`` is accepted: DNS rebinding needs a name that the attacker controls.
    """

    def __init__(self, hosts: Iterable[str] = (), origins: Iterable[str] = ()) -> None:
        own = ("localhost", socket.gethostname())
        self._hosts = {name.lower().rstrip(".") for name in (*own, *hosts)}
        self._origins = {origin.lower().rstrip("/") for origin in origins}

    def check(self, headers: Mapping[str, str]) -> None:
        """Raise ``HttpError`` if a page that may not call the server could have sent this."""
        host = headers.get("host", "")
        if not self._accepts_host(host):
            raise HttpError(
                421,
                "unknown_host",
                f"this server is not addressed as {host[:256]!r}; its operator can allow the name "
                "with --http-hosts",
            )
        origin = headers.get("origin")
        if origin is not None and not (self.is_listed(origin) or _is_own(origin, host)):
            raise HttpError(
                403,
                "foreign_origin",
                "web pages of this origin may not call the server; its operator can allow them "
                "with --http-origins",
            )

    def is_listed(self, origin: str) -> bool:
        """Whether pages of ``origin``, which is not the server's own, may call it."""
        return origin.lower() in self._origins

    def cors_headers(self, origin: str | None) -> dict[str, str]:
        """The headers that let a page of a listed origin read an answer."""
        if origin is None or not self._origins:
            return {}
        if not self.is_listed(origin):
            return {"vary": "origin"}
        return {
            "access-control-allow-origin": origin,
            "access-control-expose-headers": EXPOSED,
            "vary": "origin",
        }

    def preflight_headers(self, origin: str | None) -> dict[str, str]:
        """The answer to a browser that asks before a page of a listed origin calls.

        Raises ``HttpError`` without an origin.
        """
        if origin is None:
            raise HttpError(400, "no_origin", "no origin is named")
        return {
            **self.cors_headers(origin),
            "access-control-allow-methods": ALLOWED_METHODS,
            # "*" does not include authorization.
            "access-control-allow-headers": "authorization, *",
            "access-control-max-age": str(PREFLIGHT_SECONDS),
        }

    def _accepts_host(self, host: str) -> bool:
        found = HOST.fullmatch(host)
        if found is None:
            return False
        name = found[1].lower().rstrip(".")
        if ANY_NAME in self._hosts or name in self._hosts:
            return True
        try:
            ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True


def _is_own(origin: str, host: str) -> bool:
    """Whether ``origin`` is the server's own; behind a proxy its scheme may be another."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()
