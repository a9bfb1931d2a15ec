"""From a command's arguments to a client."""

import argparse

from darkroom_client._client import Client
from darkroom_client._connection import TLS


def connect(arguments: argparse.Namespace) -> Client:
    """A client of the server that the arguments and the environment name."""
    return Client(
        arguments.target,
        tls=TLS(ca=arguments.ca) if arguments.ca else None,
        insecure=arguments.insecure,
        timeout=arguments.timeout,
    )
