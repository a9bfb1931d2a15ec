"""SLO attainment: the share of the requests within a multiple of what they take alone.

The runs of results from before it was measured have no lone latencies, and are omitted.
"""

from collections.abc import Sequence

from bench.peers.registry import PEERS
from bench.peers.report.figures import Figure, all_rounds, images, median_of, runs_of
from bench.peers.scenarios import SCENARIOS, WITHIN
from bench.report.markdown import table
from bench.report.results import Results, Run

ALONE = "alone_seconds"
"""The figure of a run: what each of its requests takes alone, by the request's index."""


def attainment(times: float) -> Figure:
    """The share of all requests whose images came within ``times`` their lone latency."""

    def share(run: Run) -> float:
        alone: Sequence[float] = run.figures[ALONE]
        in_time = sum(each.latency <= times * alone[each.index] for each in images([run]))
        return in_time / len(run.answers)

    return share


def slo_rounds(every: Sequence[Results], scenario: str) -> list[dict[str, Run]]:
    """The rounds of a scenario whose lone latencies were measured."""
    rounds = all_rounds(every, scenario)
    return [runs for runs in rounds if all(ALONE in run.figures for run in runs.values())]


def slo_runs(results: Results) -> dict[str, dict[str, list[Run]]]:
    """By scenario of Poisson arrivals, in the order of the load: the runs of each peer."""
    plain = {name: each for name, each in SCENARIOS.items() if each.is_plain}
    found = {}
    for name in sorted(plain, key=lambda name: (plain[name].mix, plain[name].load or 0.0)):
        runs = {peer: _measured(each) for peer, each in runs_of(results, name).items()}
        if any(runs.values()):
            found[name] = {peer: each for peer, each in runs.items() if each}
    return found


def slo_table(results: Results) -> str:
    """SLO attainment against load; empty without lone latencies."""
    columns = slo_runs(results)
    if not columns:
        return ""
    rows = [
        [PEERS[peer].label, *(_cell(runs.get(peer, [])) for runs in columns.values())]
        for peer in PEERS
        if any(peer in runs for runs in columns.values())
    ]
    factors = " / ".join(map(str, WITHIN))
    return (
        f"#### SLO attainment\n\nThe share of all requests whose images came within {factors} "
        "times what they take alone in a bare `pipe()`. That is measured once a round for each "
        "kind of request, so it is the same for all peers. Poisson arrivals; the number is the "
        f"load, a share of the capacity of (a).\n\n{table(['', *columns], rows)}"
    )


def _measured(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if ALONE in run.figures]


def _cell(runs: Sequence[Run]) -> str:
    """The median share for each of ``WITHIN``; empty without runs."""
    if not runs:
        return ""
    return " / ".join(f"{median_of(runs, attainment(times)):.0%}" for times in WITHIN)
