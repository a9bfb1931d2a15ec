"""From runs to figures: by peer, and over the rounds.

A round has one machine to itself, and what is compared is of one round: a ratio is taken in each,
and the median of these is told.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.arrivals import Drawn, Outcome
from bench.goals import of_class
from bench.peers.roster import DARKROOM, PEERS
from bench.quantiles import quantile
from bench.results import Results, Run

Figure = Callable[[Run], float]


def rounds_of(results: Results, scenario: str) -> list[dict[str, Run]]:
    """The rounds of a scenario: each peer's run, in the order of ``PEERS``.

    Those that have fewer runs than others, as of a bench cut short, are left out.
    """
    found: dict[int, dict[str, Run]] = {}
    for run in results.runs:
        if run.scenario == scenario:
            found.setdefault(run.round, {})[run.contender] = run
    most = max(map(len, found.values()), default=0)
    return [
        {name: runs[name] for name in PEERS if name in runs}
        for _, runs in sorted(found.items())
        if len(runs) == most
    ]


def all_rounds(every: Sequence[Results], scenario: str) -> list[dict[str, Run]]:
    """The rounds of a scenario in several results, which may be of other machines."""
    return [runs for results in every for runs in rounds_of(results, scenario)]


def runs_of(results: Results, scenario: str) -> dict[str, list[Run]]:
    """The runs of these rounds by peer; those without any are left out."""
    rounds = rounds_of(results, scenario)
    return {
        name: [runs[name] for runs in rounds if name in runs]
        for name in PEERS
        if any(name in runs for runs in rounds)
    }


def ratios(
    rounds: Sequence[Mapping[str, Run]], figure: Figure, *, most: bool, name: str = DARKROOM
) -> list[float]:
    """A peer's figure over that of the best rival of the same round, ``most`` or least.

    Rounds without ``name``, or without a rival, are left out.
    """
    found = []
    for runs in rounds:
        rivals = [figure(run) for rival, run in runs.items() if rival != DARKROOM]
        if name in runs and rivals:
            best = max(rivals) if most else min(rivals)
            found.append(figure(runs[name]) / best if best else math.inf)
    return found


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


def latency_of(steps: int | None, share: float) -> Figure:
    """A quantile of the latencies of a class, or of all; infinite where no image came."""

    def latency(run: Run) -> float:
        latencies = of_class(images([run]), steps)
        return quantile(latencies, share) if latencies else math.inf

    return latency


def median_of(runs: Sequence[Run], figure: Figure) -> float:
    """``figure`` at the median of the rounds."""
    return statistics.median(figure(run) for run in runs)


def spread(values: Sequence[float], digits: int = 2, unit: str = "") -> str:
    """The median, with the least and the greatest where there are several."""
    text = f"{statistics.median(values):.{digits}f}{unit}"
    if len(values) > 1:
        text += f" ({min(values):.{digits}f}–{max(values):.{digits}f})"
    return text


def lone_ratios(results: Results) -> dict[str, list[float]]:
    """The times of lone requests over those of a bare ``pipe()``, of all rounds."""
    return {
        name: [pair["peer"] / pair["pipe"] for run in runs for pair in run.figures["lone"]]
        for name, runs in runs_of(results, "mixed closed").items()
    }


def versions_text(versions: Mapping[str, Any]) -> str:
    """Versions in one line."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())
