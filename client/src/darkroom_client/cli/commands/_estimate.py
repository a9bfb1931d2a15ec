"""``darkroom estimate``: the duration and memory of a request, without running it."""

import argparse
import dataclasses
import json

from darkroom_client.cli._connect import connect
from darkroom_client.cli.commands._plan import request_of
from darkroom_client.cli.terminal._console import open_console, readable_bytes, tabulate


def run(arguments: argparse.Namespace) -> int:
    """Print the seconds and the memory."""
    with connect(arguments) as client:
        estimate = client.estimate(request_of(arguments.prompt, arguments))
    if arguments.json:
        print(json.dumps(dataclasses.asdict(estimate)))
        return 0
    rows = (
        ("queue", f"{estimate.queue_wait:.2f} s"),
        ("run", f"{estimate.run_time:.2f} s"),
        ("total", f"{estimate.total:.2f} s"),
        ("memory", readable_bytes(estimate.peak_bytes)),
        ("available", readable_bytes(estimate.available_bytes)),
    )
    tabulate(open_console(), ("what", "takes"), rows)
    return 0
