"""The table of families in ``docs/models.md``, and what the code says of each."""

from pathlib import Path
from typing import Any

from darkroom_server.core.job import SchedulerName
from darkroom_server.core.model import ModelInfo
from darkroom_server.engine.components.scheduler_table import DIFFUSION_SCHEDULERS
from darkroom_server.engine.pipelines.arguments import ArgumentSpec, Kind

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
HEADING = "## Families"
FROM_FOLDER = " (its folder)"
"""After a size that the model's folder sets, and not the code."""


def read_table() -> dict[str, dict[str, str]]:
    """The rows of the table by their first cell, each with its cells by column."""
    section = DOCS.read_text("utf-8").partition(f"\n{HEADING}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def cells(info: ModelInfo, spec: ArgumentSpec | None, own_size: int) -> dict[str, str]:
    """The cells that follow from the code; ``own_size`` is without a ``darkroom.json``."""
    return {
        "pipeline class": f"`{info.kind}`",
        "guidance": _guidance(info),
        "prompts and sizes in a batch": _mixture(spec),
        "schedulers": _schedulers(info),
        "steps": str(info.defaults.steps),
        "scale": _scale(info),
        "size": str(own_size),
    }


def check_row(name: str, found: dict[str, str]) -> None:
    """Check that the row ``name`` has the cells ``found``.

    A variant without a row of its own must be as the first row of its class says.
    """
    table = read_table()
    alike = [row for row in table.values() if row["pipeline class"] == found["pipeline class"]]
    row = table[name] if name in table else alike[0]
    documented = {column: row[column] for column in found}
    if documented["size"].endswith(FROM_FOLDER):
        documented["size"] = found["size"]
    assert documented == found, name


def _guidance(info: ModelInfo) -> str:
    guidance, parts = info.guidance, []
    reads_scale = "guidance_scale" in info.optional_fields
    if reads_scale and guidance.scale != "guidance_scale":
        parts.append("embedded")
    if guidance.scale is not None:
        cost = "two rows" if guidance.rows == 2 else "two calls"
        name = "" if guidance.scale == "guidance_scale" else f" of `{guidance.scale}`"
        always = guidance.above < 0
        text = f"{cost}, always" if always else f"{cost} above {guidance.above:g}{name}"
        parts.append(text + (" with a negative prompt" if guidance.needs_negative else ""))
    return "; ".join(parts) or "none"


def _mixture(spec: ArgumentSpec | None) -> str:
    kinds: set[Any] = set() if spec is None else set(spec.kinds.values())
    prompts = "any lengths" if kinds & {Kind.PADDED, Kind.ROW_LIST} else "equal lengths"
    sizes = "similar sizes" if spec is not None and spec.mixes_sizes else "equal sizes"
    return f"{prompts}, {sizes}"


def _schedulers(info: ModelInfo) -> str:
    names = {offer.name for offer in info.schedulers} - {SchedulerName.MODEL}
    if names >= set(DIFFUSION_SCHEDULERS):
        return "all for diffusion"
    return ", ".join(f"`{name}`" for name in sorted(names)) or "its own"


def _scale(info: ModelInfo) -> str:
    parts = []
    if "guidance_scale" in info.optional_fields:
        parts.append(f"{info.defaults.guidance_scale:g}")
    if "true_cfg_scale" in info.optional_fields:
        parts.append(f"true {info.defaults.true_cfg_scale:g}")
    return ", ".join(parts) or "none"
