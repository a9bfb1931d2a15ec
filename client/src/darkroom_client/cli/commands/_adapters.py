"""``darkroom adapters``: the adapters that requests may name."""

import argparse
import dataclasses
import json

from darkroom_client._types.adapter import Adapter
from darkroom_client.cli._connect import connect
from darkroom_client.cli.terminal._console import open_console, tabulate

_COLUMNS = ("adapter", "kind", "rank", "MiB", "in memory", "models", "rejected")


def run(arguments: argparse.Namespace) -> int:
    """Print the adapters: a table on a terminal, tab-separated lines in a pipe, or JSON."""
    with connect(arguments) as client:
        adapters = client.adapters(arguments.model)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(adapter) for adapter in adapters], indent=2))
        return 0
    tabulate(open_console(), _COLUMNS, [_row(adapter) for adapter in adapters])
    return 0


def _row(adapter: Adapter) -> tuple[str, ...]:
    return (
        adapter.id,
        adapter.kind,
        str(adapter.rank),
        f"{adapter.bytes / 2**20:.1f}",
        "yes" if adapter.resident else "no",
        " ".join(adapter.models),
        adapter.rejection or "-",
    )
