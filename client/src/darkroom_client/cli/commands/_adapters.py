"""``darkroom adapters``: the adapters that requests may name; adds and removes them."""

import argparse
import dataclasses
import json
from collections.abc import Iterable

from darkroom_client._types.adapter import Adapter
from darkroom_client.cli._connect import connect
from darkroom_client.cli.terminal._console import open_console, tabulate

ACTIONS = ("list", "add", "remove")

_COLUMNS = ("adapter", "kind", "rank", "MiB", "in memory", "models", "rejected")


def run(arguments: argparse.Namespace) -> int:
    """List, add or remove; a table on a terminal, tab-separated lines in a pipe, or JSON."""
    names: list[str] = arguments.names
    if bool(names) != (arguments.action != "list"):
        arguments.parser.error(
            f"unrecognized arguments: {' '.join(names)}" if names else "give at least one NAME"
        )
    with connect(arguments) as client:
        if arguments.action == "remove":
            _print_removed(
                {name: client.remove_adapter(name) for name in names}, as_json=arguments.json
            )
        elif arguments.action == "add":
            _print_adapters(map(client.add_adapter, names), as_json=arguments.json)
        else:
            _print_adapters(client.adapters(arguments.model), as_json=arguments.json)
    return 0


def _print_adapters(adapters: Iterable[Adapter], *, as_json: bool) -> None:
    found = list(adapters)
    if as_json:
        print(json.dumps([dataclasses.asdict(adapter) for adapter in found], indent=2))
        return
    tabulate(open_console(), _COLUMNS, [_row(adapter) for adapter in found])


def _print_removed(jobs_by_name: dict[str, int], *, as_json: bool) -> None:
    if as_json:
        entries = [{"id": name, "unfinished_jobs": jobs} for name, jobs in jobs_by_name.items()]
        print(json.dumps(entries, indent=2))
        return
    rows = [(name, str(jobs)) for name, jobs in jobs_by_name.items()]
    tabulate(open_console(), ("removed", "unfinished jobs"), rows)


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
