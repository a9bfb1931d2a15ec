"""Darkroom's goals beside the best of the other peers."""

import statistics
from collections.abc import Sequence

from bench.peers.registry import DARKROOM, DARKROOM_COMPILED, SERIAL
from bench.peers.report.figures import (
    all_rounds,
    goodput,
    images_per_second,
    late_steps_per_cancel,
    latency_of,
    lone_ratios,
    ratios,
)
from bench.peers.report.slo import attainment, slo_rounds
from bench.peers.scenarios import (
    BUSY,
    CANCELLED,
    CLOSED,
    OVERLOAD,
    SATURATED,
    SIZES_CLOSED,
    UNIFORM_CLOSED,
)
from bench.report.goals import LONG, SHORT, Goal
from bench.report.results import Results
from bench.report.statistics import bootstrap_median

SLO = 5
"""The goal's number of lone latencies, one of ``scenarios.WITHIN``."""


def goals(every: Sequence[Results]) -> list[Goal]:
    """The goals whose scenario Darkroom and another peer ran, over all rounds of ``every``."""
    busy = all_rounds(every, BUSY.name)
    of_two = [{name: runs[name] for name in (SERIAL, DARKROOM) if name in runs} for runs in busy]
    late = [
        late_steps_per_cancel(r[DARKROOM])
        for r in all_rounds(every, CANCELLED.name)
        if DARKROOM in r
    ]
    found = [
        _lone(every),
        *_compiled(every),
        _goal(
            "images/s in the closed loop, against the best",
            ratios(all_rounds(every, CLOSED.name), images_per_second, most=True),
            at_least=1.75,
        ),
        _goal(
            "images/s in the closed loop, all alike, against the best",
            ratios(all_rounds(every, UNIFORM_CLOSED.name), images_per_second, most=True),
            at_least=1.02,
        ),
        _goal(
            f"p95 of {LONG} steps in the closed loop, sizes too, against the best",
            ratios(all_rounds(every, SIZES_CLOSED.name), latency_of(LONG, 0.95), most=False),
            at_most=1.1,
        ),
        *(
            _goal(name, ratios(busy, latency_of(steps, share), most=False), at_most=bound)
            for name, steps, share, bound in (
                (f"p50 of {SHORT} steps at 0.9, against the best", SHORT, 0.5, 0.4),
                (f"p95 of {SHORT} steps at 0.9, against the best", SHORT, 0.95, 0.25),
                ("p95 of all at 0.9, against the best", None, 0.95, 0.4),
            )
        ),
        _goal(
            f"p95 of {LONG} steps at 0.9, against (a)",
            ratios(of_two, latency_of(LONG, 0.95), most=False),
            at_most=1.0,
        ),
        _goal(
            "images/s within the deadline at 1.1, against the best",
            ratios(all_rounds(every, OVERLOAD.name), goodput, most=True),
            at_least=1.7,
        ),
        _goal(
            f"SLO attainment within {SLO} times alone at 1, against the best",
            ratios(slo_rounds(every, SATURATED.name), attainment(SLO), most=True),
            at_least=1.5,
        ),
        _goal("steps after a cancel, for each", late, at_most=1.0),
    ]
    return [goal for goal in found if goal is not None]


def _lone(
    every: Sequence[Results], peer: str = DARKROOM, words: str = "", at_most: float = 1.0
) -> Goal | None:
    """The goal of a lone request, with the 95 % interval of the median."""
    pairs = [ratio for results in every for ratio in lone_ratios(results).get(peer, [])]
    if not pairs:
        return None
    lone = bootstrap_median(pairs)
    name = f"a lone request{words}, against bare pipe()"
    return Goal(name, lone.value, at_most, False, (lone.low, lone.high))


def _compiled(every: Sequence[Results]) -> list[Goal | None]:
    """The goals with the compiled UNet: against the best eager peer, and the best compiled one."""
    loops = (
        ("the closed loop", CLOSED, (2.1, 1.7)),
        ("the closed loop, all alike", UNIFORM_CLOSED, (1.2, 1.02)),
    )
    return [
        _lone(every, DARKROOM_COMPILED, ", compiled", 0.85),
        *(
            _goal(
                f"images/s in {loop}, compiled, against the best {kind} one",
                ratios(
                    all_rounds(every, scenario.name),
                    images_per_second,
                    most=True,
                    name=DARKROOM_COMPILED,
                    compiled=kind == "compiled",
                ),
                at_least=bound,
            )
            for loop, scenario, bounds in loops
            for kind, bound in zip(("eager", "compiled"), bounds, strict=True)
        ),
    ]


def _goal(
    name: str, reached: Sequence[float], *, at_least: float | None = None, at_most: float = 0.0
) -> Goal | None:
    """The median of what was ``reached`` in the rounds; None without rounds."""
    if not reached:
        return None
    between = (min(reached), max(reached)) if len(reached) > 1 else None
    bound = at_most if at_least is None else at_least
    return Goal(name, statistics.median(reached), bound, at_least is not None, between)
