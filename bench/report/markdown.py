"""The Markdown that the benchmarks write: tables, and sections within hand-written pages."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report.goals import Goal
from bench.report.results import ROOT, Results

DOCS = ROOT / "docs"


def replace_section(page: str, name: str, text: str) -> str:
    """``page`` with ``text`` between the marks of section ``name``; appended if it has none."""
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    section = f"{begin}\n\n{text.strip()}\n\n{end}"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if pattern.search(page):
        return pattern.sub(lambda _: section, page)
    return f"{page.rstrip()}\n\n{section}\n"


def write_section(file: str, name: str, text: str, docs: Path = DOCS) -> Path:
    """Write section ``name`` of the page ``file`` in ``docs``; creates the page if needed."""
    path = docs / file
    docs.mkdir(parents=True, exist_ok=True)
    title = path.stem.capitalize()
    page = path.read_text(encoding="utf-8") if path.exists() else f"# {title}\n"
    path.write_text(replace_section(page, name, text), encoding="utf-8")
    return path


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = [heads, ["---", *["--:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(text: str) -> str:
    """``text`` as one cell of a table: on one line, with "|" escaped."""
    return " ".join(text.split()).replace("|", r"\|")


def layout_words(runtime: Mapping[str, Any]) -> str:
    """What follows the dtype of ``runtime`` in a sentence, such as ", channels last".

    Results from before ``vae_channels_last`` lack it: there the VAE had the denoiser's layout.
    """
    denoiser = runtime["channels_last"]
    if runtime.get("vae_channels_last", denoiser) == denoiser:
        return ", channels last" if denoiser else ""
    return f", the {'denoiser' if denoiser else 'VAE'} channels last"


def goals_table(head: str, goals: Sequence[Goal], unit: str = "") -> str:
    """What was reached of each goal; a column of ranges if any goal has one."""
    ranges = any(goal.between for goal in goals)
    heads = [head, "goal", "reached", *(["between"] if ranges else []), "met"]
    rows = []
    for goal in goals:
        between = f"{goal.between[0]:.2f}–{goal.between[1]:.2f}" if goal.between else ""
        rows.append(
            [
                goal.name,
                f"{'≥' if goal.at_least else '≤'} {goal.bound:g}{unit}",
                f"{goal.reached:.2f}{unit}",
                *([between] if ranges else []),
                "yes" if goal.met else "**no**",
            ]
        )
    return table(heads, rows)


def provenance(results: Results, command: str) -> str:
    """The first line of a section: when, on what machine, with what, by which command."""
    return (
        f"{results.date}, {results.machine.text}; {versions_text(results.versions)}. Made by "
        f"`{command}` from `bench/results/{results.name}.json`."
    )


def versions_text(versions: Mapping[str, str]) -> str:
    """Versions in one line."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def join(parts: Sequence[str]) -> str:
    """The parts that are not empty, with a blank line between them."""
    return "\n\n".join(part for part in parts if part)
