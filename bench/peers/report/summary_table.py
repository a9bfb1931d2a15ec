"""Darkroom beside the best other peer, in all scenarios: one table."""

import math
from collections.abc import Sequence

from bench.peers.registry import DARKROOM, EAGER
from bench.peers.report.figures import (
    Figure,
    all_rounds,
    goodput,
    images_per_second,
    latency_of,
    ratios,
    spread,
)
from bench.peers.scenarios import SCENARIOS, Mix, Scenario
from bench.report.goals import LONG, SHORT
from bench.report.markdown import table
from bench.report.results import Results

LATENCIES = {
    "p50 of all": (None, 0.5),
    "p95 of all": (None, 0.95),
    f"p50 of {SHORT} steps": (SHORT, 0.5),
    f"p95 of {SHORT} steps": (SHORT, 0.95),
    f"p95 of {LONG} steps": (LONG, 0.95),
}


def summary_table(every: Sequence[Results]) -> str:
    """The ratios of all rounds of ``every``; empty if no round has two peers to compare."""
    rows = []
    for name, scenario in SCENARIOS.items():
        rounds = [r for r in all_rounds(every, name) if DARKROOM in r and len(r.keys() & EAGER) > 1]
        rate = _rate(scenario)
        cells = [_cell(ratios(rounds, rate, most=True)) if rate else ""]
        for steps, share in LATENCIES.values():
            shown = not scenario.deadlines and (steps is None or scenario.mix is not Mix.UNIFORM)
            found = ratios(rounds, latency_of(steps, share), most=False) if shown else []
            cells.append(_cell(found))
        if any(cells):
            rows.append([name, str(len(rounds)), *cells])
    if not rows:
        return ""
    heads = ["", "rounds", "images/s", *LATENCIES]
    return (
        "### Summary\n\nDarkroom's figure over that of the best other peer in the same round, "
        "median (minimum–maximum). Images/s: all images of closed loops; with deadlines, those "
        "in time. Latencies with deadlines are omitted, since only requests in time have one "
        "(survivorship bias). The number is the load, a share of the capacity of (a)."
        f"\n\n{table(heads, rows)}"
    )


def _rate(scenario: Scenario) -> Figure | None:
    if scenario.load is None:
        return images_per_second
    return goodput if scenario.deadlines else None


def _cell(found: Sequence[float]) -> str:
    finite = [ratio for ratio in found if math.isfinite(ratio)]
    return spread(finite, unit="×") if finite else ""
