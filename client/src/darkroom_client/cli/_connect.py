"""From a command's arguments to a client."""

import argparse
from typing import Any

from darkroom_client._async_client import AsyncClient
from darkroom_client._client import Client
from darkroom_client._connection import TLS


def connect(arguments: argparse.Namespace) -> Client:
    """A client of the server that the arguments and the environment name."""
    return Client(arguments.target, **_options(arguments))


def connect_async(arguments: argparse.Namespace) -> AsyncClient:
    """As ``connect``, for asyncio."""
    return AsyncClient(arguments.target, **_options(arguments))


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "tls": TLS(ca=arguments.ca) if arguments.ca else None,
        "insecure": arguments.insecure,
        "timeout": arguments.timeout,
    }
