"""From runs to figures: by peer, and over the rounds.

The speed of a machine may change between rounds, so ratios are taken within a round; the page shows
their median.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from bench.peers.registry import DARKROOM, PEERS
from bench.peers.scenarios import SCENARIOS
from bench.report.goals import of_class
from bench.report.results import Results, Run
from bench.report.statistics import quantile
from bench.workload.arrivals import Answer, Outcome

Figure = Callable[[Run], float]


def rounds_of(results: Results, scenario: str) -> list[dict[str, Run]]:
    """The rounds of a scenario: each peer's run, in the order of ``PEERS``.

    Omits rounds with fewer runs than others, as of an interrupted benchmark.
    """
    found: dict[int, dict[str, Run]] = {}
    for run in results.runs:
        if run.scenario == scenario:
            found.setdefault(run.round, {})[run.peer] = run
    most = max(map(len, found.values()), default=0)
    return [
        {name: runs[name] for name in PEERS if name in runs}
        for _, runs in sorted(found.items())
        if len(runs) == most
    ]


def all_rounds(every: Sequence[Results], scenario: str) -> list[dict[str, Run]]:
    """The newest rounds of a scenario: of all results of the last date that has any.

    They may be from several machines. Omits those that had other requests, in an earlier version
    of the scenario.
    """
    found: dict[str, list[dict[str, Run]]] = {}
    for results in every:
        for runs in rounds_of(results, scenario):
            if all(SCENARIOS[scenario].has(run.answers) for run in runs.values()):
                found.setdefault(results.date, []).append(runs)
    return found[max(found)] if found else []


def runs_of(results: Results, scenario: str) -> dict[str, list[Run]]:
    """The runs of these rounds by peer; omits peers without any."""
    rounds = rounds_of(results, scenario)
    return {
        name: [runs[name] for runs in rounds if name in runs]
        for name in PEERS
        if any(name in runs for runs in rounds)
    }


def ratios(
    rounds: Sequence[Mapping[str, Run]],
    figure: Figure,
    *,
    most: bool,
    name: str = DARKROOM,
    compiled: bool | None = None,
) -> list[float]:
    """A peer's figure over that of the best other peer in the same round, except Darkroom.

    The best is the one that leaves ``name`` the worst median, of the peers with the compiled UNet
    or of those with the eager one: ``compiled``, None: as ``name`` itself. ``most``: a large figure
    is good. It is one peer for all rounds, since the best of each round is the luckiest one on a
    noisy machine. Omits rounds without ``name`` or without that peer.
    """
    if compiled is None:
        compiled = PEERS[name].compiled
    able = [n for n, p in PEERS.items() if p.compiled == compiled and not p.is_darkroom]
    found = [
        [_over(figure(r[name]), figure(r[other])) for r in rounds if name in r and other in r]
        for other in able
    ]
    worst = min if most else max
    return worst(filter(None, found), key=statistics.median, default=[])


def _over(figure: float, other: float) -> float:
    """Their ratio; infinite if ``other`` is 0 or ``figure`` infinite, as without any image."""
    if math.isinf(figure) or not other:
        return math.inf
    return figure / other


def images(runs: Sequence[Run]) -> list[Answer]:
    """The answers with images."""
    return [each for run in runs for each in run.answers if each.outcome is Outcome.IMAGE]


def images_per_second(run: Run) -> float:
    """Images/s of a closed loop, while every caller is busy and has had an answer."""
    return run.images_while_busy / run.busy_seconds


def goodput(run: Run) -> float:
    """Images/s within their deadline, from the first arrival to the last."""
    in_time = [d for d in images([run]) if d.deadline is not None and d.latency <= d.deadline]
    return sum(each.images for each in in_time) / run.busy_seconds


def cpu_seconds_per_image(run: Run) -> float:
    """CPU seconds of all processes of a peer."""
    seconds: float = run.figures["cpu_seconds"]
    return seconds / sum(each.images for each in images([run]))


def late_steps_per_cancel(run: Run) -> float:
    """Work for each cancelled request after its cancel, in steps of a lone request."""
    late: float = run.figures["waste"]["late"]
    cancels: int = run.figures["waste"]["cancels"]
    nominal = (run.nominal_before + run.nominal_after) / 2
    return late / nominal / max(1, cancels)


def latency_of(steps: int | None, share: float) -> Figure:
    """A quantile of the latencies of a class, or of all; infinite without images."""

    def latency(run: Run) -> float:
        latencies = of_class(images([run]), steps)
        return quantile(latencies, share) if latencies else math.inf

    return latency


def median_of(runs: Sequence[Run], figure: Figure) -> float:
    """``figure`` at the median of the rounds."""
    return statistics.median(figure(run) for run in runs)


def spread(values: Sequence[float], digits: int = 2, unit: str = "") -> str:
    """The median, with the minimum and the maximum if there are several values."""
    text = f"{statistics.median(values):.{digits}f}{unit}"
    if len(values) > 1:
        text += f" ({min(values):.{digits}f}–{max(values):.{digits}f})"
    return text


def lone_ratios(results: Results) -> dict[str, list[float]]:
    """Times of lone requests over those of a bare ``pipe()``, of all rounds, by peer."""
    return {
        name: [pair["peer"] / pair["pipe"] for run in runs for pair in run.figures["lone"]]
        for name, runs in runs_of(results, "mixed closed").items()
    }
