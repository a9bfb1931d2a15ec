"""Make a client from a command's arguments."""

import argparse
import os
import ssl
from typing import Any

from darkroom_client._async_client import AsyncClient
from darkroom_client._client import Client
from darkroom_client._types.connection import TLS

# OpenSSL's own path is first, with SSL_CERT_FILE; a distribution may have its file elsewhere.
_ROOTS = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


def connect(arguments: argparse.Namespace) -> Client:
    """A client of the server that the arguments and the environment name."""
    return Client(arguments.target, **_options(arguments))


def connect_async(arguments: argparse.Namespace) -> AsyncClient:
    """Like ``connect``, for asyncio."""
    return AsyncClient(arguments.target, **_options(arguments))


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "tls": _tls(arguments),
        "insecure": arguments.insecure,
        "timeout": arguments.timeout,
    }


def _tls(arguments: argparse.Namespace) -> TLS | None:
    """None without a flag of TLS: the client reads DARKROOM_CA."""
    flags = (arguments.tls, arguments.ca, arguments.cert, arguments.key, arguments.server_name)
    if not any(flags):
        return None
    return TLS(
        ca=arguments.ca or os.environ.get("DARKROOM_CA") or system_roots(),
        cert=arguments.cert,
        key=arguments.key,
        server_name=arguments.server_name,
    )


def system_roots() -> str | None:
    """The file of the CAs that this machine trusts; None for the roots that come with gRPC."""
    candidates = (ssl.get_default_verify_paths().cafile, *_ROOTS)
    return next((path for path in candidates if path and os.path.exists(path)), None)
