"""``darkroom models``: the models of the server, and their defaults."""

import argparse
import dataclasses
import json

from darkroom_client._types.model import Model
from darkroom_client.cli._connect import connect
from darkroom_client.cli.terminal._console import open_console, tabulate


def run(arguments: argparse.Namespace) -> int:
    """Print the models: a table on a terminal, tab-separated lines in a pipe, or JSON."""
    with connect(arguments) as client:
        models = client.models()
    if arguments.json:
        print(json.dumps([dataclasses.asdict(model) for model in models], indent=2))
        return 0
    tabulate(open_console(), _COLUMNS, [_row(model) for model in models])
    return 0


_COLUMNS = (
    "model",
    "state",
    "size",
    "steps",
    "guidance",
    "scheduler",
    "runs on",
    "schedulers",
    "takes",
    "why",
)


def _row(model: Model) -> tuple[str, ...]:
    """A row for ``_COLUMNS``; the numbers are the defaults, and ``takes`` the optional fields.

    ``why`` says why the model runs with its preset and its dtype.
    """
    defaults, runtime = model.defaults, model.runtime
    if not model.ready or defaults is None or runtime is None:
        return (model.id, "loading", *("-" for _ in _COLUMNS[2:]))
    return (
        model.id,
        "ready",
        f"{defaults.width}x{defaults.height}",
        str(defaults.steps),
        f"{defaults.guidance_scale:g}",
        defaults.scheduler or "-",
        " ".join(filter(None, (runtime.device, runtime.dtype, runtime.preset, runtime.denoiser))),
        " ".join(offer.scheduler for offer in model.schedulers),
        " ".join(model.optional_fields) or "-",
        "; ".join(filter(None, (runtime.preset_rule, runtime.format_rule))) or "-",
    )
