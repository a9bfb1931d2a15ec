"""Make a client from a command's arguments."""

import argparse
import os
from typing import Any

from darkroom_client._async_client import AsyncClient
from darkroom_client._client import Client
from darkroom_client._types.connection import TLS


def connect(arguments: argparse.Namespace) -> Client:
    """A client of the server that the arguments and the environment name."""
    return Client(arguments.target, **_options(arguments))


def connect_async(arguments: argparse.Namespace) -> AsyncClient:
    """Like ``connect``, for asyncio."""
    return AsyncClient(arguments.target, **_options(arguments))


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    tls = None
    if arguments.ca or arguments.cert or arguments.key:
        ca = arguments.ca or os.environ.get("DARKROOM_CA") or None
        tls = TLS(ca=ca, cert=arguments.cert, key=arguments.key)
    return {
        "tls": tls,
        "insecure": arguments.insecure,
        "timeout": arguments.timeout,
    }
