"""``darkroom cancel``: cancel jobs."""

import argparse

from darkroom_client.cli._connect import connect
from darkroom_client.cli.terminal._console import open_console


def run(arguments: argparse.Namespace) -> int:
    """Cancel each job, and print whether it had already ended."""
    console = open_console()
    with connect(arguments) as client:
        for request_id in arguments.request_ids:
            cancelled = client.cancel(request_id)
            console.print(f"{request_id}  {'cancelled' if cancelled else 'had already ended'}")
    return 0
