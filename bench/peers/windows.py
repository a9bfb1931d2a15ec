"""How long a batch waits for company: what suits each of the peers that batch, as measured."""

from collections.abc import Mapping, Sequence

from bench.peers.figures import images_per_second
from bench.peers.roster import PEERS
from bench.peers.scenarios import Scenario
from bench.results import Results, Run
from bench.sections import table

USUAL = 0.01
"""Seconds, where none were tried: callers ask again within a few milliseconds."""

TRIED: Sequence[float] = (0.002, USUAL, 0.05, 0.2)
"""What ``make bench-full`` tries, in seconds."""

CLOSE = 0.98
"""Of the most images/s. The shortest window that gives so many is best: a lone caller waits too."""


def trials(windows: Sequence[float]) -> list[Scenario]:
    """The closed loops in which ``windows`` are tried."""
    return [Scenario(window=window) for window in windows]


def tried(runs: Sequence[Run]) -> dict[str, dict[float, float]]:
    """Images/s of each peer by the window, in seconds."""
    found: dict[str, dict[float, float]] = {}
    for run in runs:
        window = run.figures.get("window_seconds")
        if window is not None and run.scenario == Scenario(window=window).name:
            found.setdefault(run.contender, {})[window] = images_per_second(run)
    return {name: found[name] for name in PEERS if name in found}


def best(rates: Mapping[float, float]) -> float:
    """The window that a peer is given, of those tried."""
    enough = CLOSE * max(rates.values())
    return min(window for window, rate in rates.items() if rate >= enough)


def windows_table(results: Results) -> str:
    """What was tried; empty where nothing was."""
    found = tried(results.runs)
    if not found:
        return ""
    windows = sorted({window for rates in found.values() for window in rates})
    rows = [
        [
            PEERS[name].label,
            *(_cell(rates, window) for window in windows),
        ]
        for name, rates in found.items()
    ]
    heads = ["images/s", *(f"{window * 1000:g} ms" for window in windows)]
    return (
        "#### How long a batch waits for company\n\nTried first, in the mixed closed loop; from "
        f"then on each had the shortest wait that gave {CLOSE:.0%} of its most images/s, in "
        f"bold.\n\n{table(heads, rows)}"
    )


def _cell(rates: Mapping[float, float], window: float) -> str:
    if window not in rates:
        return ""
    text = f"{rates[window]:.2f}"
    return f"**{text}**" if window == best(rates) else text
