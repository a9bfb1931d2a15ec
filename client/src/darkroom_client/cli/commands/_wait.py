"""``darkroom wait``: return when the server is ready."""

import argparse

from darkroom_client.cli._connect import connect
from darkroom_client.cli.terminal._console import open_console


def run(arguments: argparse.Namespace) -> int:
    """Wait until the models are loaded and warmed up."""
    with connect(arguments) as client:
        client.wait_until_ready(arguments.timeout)
        open_console().print(f"ready: {client.target}")
    return 0
