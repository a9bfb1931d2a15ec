"""From runs to figures: by peer, and over the rounds."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.arrivals import Drawn, Outcome
from bench.goals import of_class
from bench.peers.roster import DARKROOM, PEERS
from bench.quantiles import quantile
from bench.results import Results, Run


def runs_of(results: Results, scenario: str) -> dict[str, list[Run]]:
    """The runs of a scenario by peer, in the order of ``PEERS``; those without any are left out."""
    found = {
        name: [r for r in results.runs if (r.scenario, r.contender) == (scenario, name)]
        for name in PEERS
    }
    return {name: runs for name, runs in found.items() if runs}


def images(runs: Sequence[Run]) -> list[Drawn]:
    """What became an image."""
    return [each for run in runs for each in run.drawn if each.outcome is Outcome.IMAGE]


def images_per_second(run: Run) -> float:
    """Of a closed loop, while every caller was there."""
    return run.drawn_while_busy / run.busy_seconds


def goodput(run: Run) -> float:
    """Images a second that came within their deadline, from the first arrival to the last."""
    in_time = [d for d in images([run]) if d.deadline is not None and d.latency <= d.deadline]
    return len(in_time) / run.busy_seconds


def cpu_seconds_per_image(run: Run) -> float:
    """Of all processes of a peer."""
    seconds: float = run.figures["cpu_seconds"]
    return seconds / len(images([run]))


def late_steps_per_cancel(run: Run) -> float:
    """Work done for callers that had left, in steps of a lone request, for each of them."""
    late: float = run.figures["waste"]["late"]
    leavers: int = run.figures["waste"]["cancels"]
    nominal = (run.nominal_before + run.nominal_after) / 2
    return late / nominal / max(1, leavers)


def latency(runs: Sequence[Run], steps: int | None, share: float) -> float:
    """A quantile of the latencies of a class, or of all, at the median of the rounds."""
    return statistics.median(quantile(of_class(images([r]), steps), share) for r in runs)


def median_of(runs: Sequence[Run], figure: Callable[[Run], float]) -> float:
    """``figure`` at the median of the rounds."""
    return statistics.median(figure(run) for run in runs)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The median, with the least and the greatest where there are several."""
    text = f"{statistics.median(values):.{digits}f}"
    if len(values) > 1:
        text += f" ({min(values):.{digits}f}–{max(values):.{digits}f})"
    return text


def lone_ratios(results: Results) -> dict[str, list[float]]:
    """The times of lone requests over those of a bare ``pipe()``, of all rounds."""
    return {
        name: [pair["peer"] / pair["pipe"] for run in runs for pair in run.figures["lone"]]
        for name, runs in runs_of(results, "mixed closed").items()
    }


def best_rival(figures: Mapping[str, float], most: bool) -> str | None:
    """Who is best, by the most or the least, of those that are not Darkroom."""
    rivals = {name: figure for name, figure in figures.items() if name != DARKROOM}
    if not rivals:
        return None
    return max(rivals, key=rivals.__getitem__) if most else min(rivals, key=rivals.__getitem__)


def versions_text(versions: Mapping[str, Any]) -> str:
    """Versions in one line."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())
