"""``darkroom models``: the models of the server; loads, unloads and pins them."""

import argparse
import dataclasses
import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

from darkroom_client._types.model import Model, ModelLoad, ModelState
from darkroom_client.cli._connect import connect
from darkroom_client.cli.terminal._console import (
    open_console,
    readable_bytes,
    readable_seconds,
    tabulate,
)

ACTIONS = ("list", "load", "unload", "pin")
SHORT_SECONDS = 10.0
"""How long the calls may take that load nothing."""

_COLUMNS = (
    "model",
    "state",
    "pinned",
    "weights",
    "last used",
    "size",
    "steps",
    "guidance",
    "scheduler",
    "runs on",
    "schedulers",
    "takes",
    "why",
)


def run(arguments: argparse.Namespace) -> int:
    """List, load, unload or pin; a table on a terminal, tab-separated lines in a pipe, or JSON."""
    action: str = arguments.action
    names: list[str] = arguments.names
    if bool(names) != (action != "list"):
        arguments.parser.error(
            f"unrecognized arguments: {' '.join(names)}" if names else "give at least one NAME"
        )
    if arguments.unpin and action != "pin":
        arguments.parser.error("--unpin is for pin")
    loads = action == "load" or (action == "pin" and not arguments.unpin)
    if arguments.timeout is None and not loads:
        arguments.timeout = SHORT_SECONDS
    with connect(arguments) as client:
        if action == "unload":
            _print_unloaded(
                {name: client.unload_model(name) for name in names}, as_json=arguments.json
            )
        elif action == "load":
            _print_models(map(client.load_model, names), as_json=arguments.json)
        elif action == "pin":
            pinned = not arguments.unpin
            changed = (client.pin_model(name, pinned=pinned) for name in names)
            _print_models(changed, as_json=arguments.json)
        else:
            _print_models(client.models(), as_json=arguments.json)
    return 0


def _print_models(models: Iterable[Model], *, as_json: bool) -> None:
    found = list(models)
    if as_json:
        entries = [dataclasses.asdict(model) for model in found]
        print(json.dumps(entries, indent=2, default=datetime.isoformat))
        return
    tabulate(open_console(), _COLUMNS, [_row(model) for model in found], whole=2)


def _print_unloaded(jobs_by_name: dict[str, int], *, as_json: bool) -> None:
    if as_json:
        entries = [{"id": name, "unfinished_jobs": jobs} for name, jobs in jobs_by_name.items()]
        print(json.dumps(entries, indent=2))
        return
    rows = [(name, str(jobs)) for name, jobs in jobs_by_name.items()]
    tabulate(open_console(), ("unloaded", "unfinished jobs"), rows)


def _row(model: Model) -> tuple[str, ...]:
    """A row for ``_COLUMNS``; the numbers are the defaults, and ``takes`` the optional fields.

    ``why`` says why a model cannot be loaded, how far its load is, or why it runs with its preset
    and its dtype.
    """
    return (
        model.id,
        model.state,
        "yes" if model.pinned else "no",
        readable_bytes(model.weight_bytes) if model.weight_bytes else "-",
        _time(model.last_used),
        *_requests(model),
        _runs_on(model),
        " ".join(offer.scheduler for offer in model.schedulers) or "-",
        " ".join(model.optional_fields) or "-",
        "; ".join(_why(model)) or "-",
    )


def _requests(model: Model) -> tuple[str, str, str, str]:
    """The default size, steps, guidance and scheduler."""
    defaults = model.defaults
    if defaults is None:
        return "-", "-", "-", "-"
    return (
        f"{defaults.width}x{defaults.height}",
        str(defaults.steps),
        f"{defaults.guidance_scale:g}",
        defaults.scheduler or "-",
    )


def _runs_on(model: Model) -> str:
    if (runtime := model.runtime) is None:
        return "-"
    stored = (runtime.quantization, runtime.offload and f"offload={runtime.offload}")
    words = (runtime.device, runtime.dtype, runtime.preset, runtime.denoiser, *stored)
    return " ".join(filter(None, words))


def _why(model: Model) -> Iterator[str]:
    if model.state is ModelState.FAILED:
        yield model.state_reason
    if model.files_changed:
        yield f"its files have changed: 'darkroom models load {model.id}' reads them again"
    if model.load is not None:
        yield from load_progress(model.load)
    if (runtime := model.runtime) is not None:
        yield from filter(None, (runtime.preset_rule, runtime.format_rule))


def load_progress(load: ModelLoad) -> Iterator[str]:
    """How far a load is: what was fetched, and the time that remains, as far as it is known."""
    if load.fetch_bytes or load.fetched_bytes:
        total = f" of {readable_bytes(load.fetch_bytes)}" if load.fetch_bytes else ""
        yield f"{readable_bytes(load.fetched_bytes)}{total} fetched"
    if load.remaining_seconds is not None:
        yield f"{readable_seconds(load.remaining_seconds)} remaining"


def _time(moment: datetime | None) -> str:
    """A time in UTC as ISO 8601, to the second."""
    return f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}" if moment is not None else "-"
