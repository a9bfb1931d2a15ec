"""Darkroom beside the best peer, in everything that was run: one table."""

import math
from collections.abc import Sequence

from bench.goals import LONG, SHORT
from bench.peers.figures import (
    Figure,
    all_rounds,
    goodput,
    images_per_second,
    latency_of,
    ratios,
    spread,
)
from bench.peers.roster import DARKROOM
from bench.peers.scenarios import SCENARIOS, Mix, Scenario
from bench.results import Results
from bench.sections import table

LATENCIES = {
    "p50 of all": (None, 0.5),
    "p95 of all": (None, 0.95),
    f"p50 of {SHORT} steps": (SHORT, 0.5),
    f"p95 of {SHORT} steps": (SHORT, 0.95),
    f"p95 of {LONG} steps": (LONG, 0.95),
}


def glance(every: Sequence[Results]) -> str:
    """The ratios of all rounds of ``every``; empty where nothing has two to compare."""
    rows = []
    for name, scenario in SCENARIOS.items():
        rounds = [r for r in all_rounds(every, name) if DARKROOM in r and len(r) > 1]
        rate = _rate(scenario)
        cells = [_cell(ratios(rounds, rate, most=True)) if rate else ""]
        for steps, share in LATENCIES.values():
            told = not scenario.deadlines and (steps is None or scenario.mix is not Mix.UNIFORM)
            found = ratios(rounds, latency_of(steps, share), most=False) if told else []
            cells.append(_cell(found))
        if any(cells):
            rows.append([name, str(len(rounds)), *cells])
    if not rows:
        return ""
    heads = ["", "rounds", "images/s", *LATENCIES]
    return (
        "### At a glance\n\nDarkroom's figure over that of the best peer in the same round, median "
        "(least–greatest). Images/s: of the closed loops as many as come, with deadlines those in "
        "time, where latencies are left out since they would be of the lucky ones. The number is "
        f"the load, a share of what (a) can do.\n\n{table(heads, rows)}{_alike(rows)}"
    )


def _alike(rows: Sequence[Sequence[str]]) -> str:
    """Why the one row is as it is, whose engine was profiled; empty where it is not there."""
    if Scenario(mix=Mix.UNIFORM).name not in {name for name, *_ in rows}:
        return ""
    return (
        "\n\nWhere all requests are alike and every caller comes back at once, static batches are "
        "at their best: all images of one begin and end together, and are decoded in one call. "
        "Darkroom, which expects nobody, begins a pass before a caller is back, so each image "
        "costs the others a part of a pass more, and encodes prompts and decodes images one by "
        "one, which takes longer than together."
    )


def _rate(scenario: Scenario) -> Figure | None:
    if scenario.load is None:
        return images_per_second
    return goodput if scenario.deadlines else None


def _cell(found: Sequence[float]) -> str:
    finite = [ratio for ratio in found if math.isfinite(ratio)]
    return spread(finite, unit="×") if finite else ""
