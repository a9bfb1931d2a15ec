"""What Darkroom is to reach beside the best of the peers, and whether it does."""

from collections.abc import Callable, Sequence

from bench.goals import LONG, SHORT, Goal
from bench.peers.figures import (
    best_rival,
    goodput,
    images_per_second,
    late_steps_per_cancel,
    latency,
    lone_ratios,
    median_of,
    runs_of,
)
from bench.peers.roster import DARKROOM, SERIAL
from bench.peers.scenarios import BUSY, CLOSED, LEAVERS, OVERLOAD
from bench.quantiles import bootstrap_median
from bench.results import Results, Run

Figure = Callable[[Sequence[Run]], float]


def goals(results: Results) -> list[Goal]:
    """Every goal whose scenario was run by Darkroom and a rival."""
    found = []
    ratios = lone_ratios(results).get(DARKROOM)
    if ratios:
        lone = bootstrap_median(ratios).value
        found.append(Goal("a lone request, against bare pipe()", lone, 1.03, False))

    def add(name: str, scenario: str, figure: Figure, bound: float, at_least: bool) -> None:
        figures = {peer: figure(runs) for peer, runs in runs_of(results, scenario).items()}
        rival = best_rival(figures, most=at_least)
        if DARKROOM in figures and rival is not None:
            found.append(Goal(name, figures[DARKROOM] / figures[rival], bound, at_least))

    def closed(runs: Sequence[Run]) -> float:
        return median_of(runs, images_per_second)

    add("images/s in the closed loop, against the best", CLOSED.name, closed, 1.3, True)
    for name, steps, share, bound in (
        (f"p50 of {SHORT} steps at 0.9, against the best", SHORT, 0.5, 0.4),
        (f"p95 of {SHORT} steps at 0.9, against the best", SHORT, 0.95, 0.25),
        ("p95 of all at 0.9, against the best", None, 0.95, 0.6),
    ):
        add(name, BUSY.name, _latency(steps, share), bound, False)
    busy = runs_of(results, BUSY.name)
    if DARKROOM in busy and SERIAL in busy:
        long = _latency(LONG, 0.95)
        ratio = long(busy[DARKROOM]) / long(busy[SERIAL])
        found.append(Goal(f"p95 of {LONG} steps at 0.9, against (a)", ratio, 1.0, False))

    def in_time(runs: Sequence[Run]) -> float:
        return median_of(runs, goodput)

    add("images/s within the deadline at 1.1, against the best", OVERLOAD.name, in_time, 1.3, True)
    leavers = runs_of(results, LEAVERS.name).get(DARKROOM)
    if leavers:
        late = median_of(leavers, late_steps_per_cancel)
        found.append(Goal("steps after a cancel, for each", late, 1.0, False))
    return found


def _latency(steps: int | None, share: float) -> Figure:
    return lambda runs: latency(runs, steps, share)
