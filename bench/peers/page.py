"""``docs/benchmarks.md``, the part on the peers: every figure comes from the results."""

from collections.abc import Sequence

from bench.goals import Goal
from bench.peers.figures import runs_of, versions_text
from bench.peers.glance import glance
from bench.peers.goals import goals
from bench.peers.roster import DARKROOM, PEERS
from bench.peers.scenarios import SCENARIOS
from bench.peers.tables import closed_loop, drift, equality, lone, open_loop, resources
from bench.peers.windows import best, tried, windows_table
from bench.results import Results
from bench.sections import table
from bench.workload import STEPS

Plots = Sequence[tuple[str, str]]
"""(file, caption) of each."""


def page(every: Sequence[Results], folder: str, plots: Sequence[Plots]) -> str:
    """The section, of one bench or of several, on other machines; ``plots`` are of each.

    ``folder`` is that of the plots' files as the page sees it.
    """
    parts = [
        "## Darkroom beside other servers",
        _what(every),
        _goals(goals(every)),
        glance(every),
        *(_of_one(results, folder, shown) for results, shown in zip(every, plots, strict=True)),
    ]
    return "\n\n".join(part for part in parts if part)


def _what(every: Sequence[Results]) -> str:
    """What took part, and how it was measured; the same for each bench."""
    shares = ", ".join(f"{steps} steps {share:.0%}" for steps, share in STEPS.items())
    took_part = {name for results in every for name in results.figures["versions"]}
    peers = "\n".join(
        f"- {PEERS[name].label}: {text}" for name, text in DESCRIPTIONS.items() if name in took_part
    )
    return (
        f"{peers}\n\nThe same requests for each, over the wire, PNG files back; mixed means "
        f"{shares}, guidance 4 or 7.5. Latencies count from the scheduled arrival. Each run has a "
        "fresh server, warmed up by short requests, that has the machine to itself with the load's "
        "own process; who goes first changes. A ratio is taken within a round, beside the best "
        "peer of that round. Made by `python -m bench.peers`."
    )


def _of_one(results: Results, folder: str, plots: Plots) -> str:
    """All that one bench saw."""
    shown = [
        f"![{caption.partition('.')[0]}]({folder}/{file})\n\n{caption}" for file, caption in plots
    ]
    parts = [
        f"### {results.machine.text}, {results.date}",
        _setting(results),
        *shown,
        lone(results),
        *(closed_loop(results, name) for name in _scenarios(results, closed=True)),
        *(open_loop(results, name) for name in _scenarios(results, closed=False)),
        windows_table(results),
        resources(results),
        equality(results),
        drift(results),
    ]
    return "\n\n".join(part for part in parts if part)


def _setting(results: Results) -> str:
    runtime, settings = results.model["runtime"], results.settings
    layout = ", channels last" if runtime["channels_last"] else ""
    peers = "; ".join(
        f"{PEERS[name].label}: {versions_text(versions)}"
        for name, versions in results.figures["versions"].items()
    )
    lost = "".join(f"\n\n{line}." for line in results.figures["lost"])
    note = f"\n\n{results.note}" if results.note else ""
    # Not those that were planned: a bench may have been cut short.
    rounds = 1 + max((run.round for run in results.runs), default=0)
    times = "One round" if rounds == 1 else f"{rounds} rounds: medians of them (least–greatest)"
    return (
        f"Model `{results.model['id']}` ({results.model['width']}×{results.model['height']}, "
        f"{results.model['scheduler']}), all in {runtime['dtype']}, attention "
        f"{runtime['attention']}{layout}, on one thread that calls torch. At most "
        f"{settings['widest']} images share a call or a pass; a batch waits {_wait(results)} for "
        f"company. {times}. Raw latencies in `bench/results/{results.name}.json`. "
        f"{versions_text(results.versions)}; {peers}.{lost}{note}"
    )


def _wait(results: Results) -> str:
    """As it was tried out, or as it was told."""
    chosen = [
        f"{best(rates) * 1000:g} ms ({PEERS[name].label})"
        for name, rates in tried(results.runs).items()
    ]
    return ", ".join(chosen) or f"{results.settings['window_seconds'] * 1000:g} ms"


DESCRIPTIONS = {
    "grpc": "the usual gRPC service, a pool of threads before one caller of `pipe()`",
    "litserve": "batches, within which equal settings share a call of `pipe()`",
    "ray": "`@serve.batch`, a queue for each of the settings",
    "triton": "nvidia-pytriton, dynamic batching, within which equal settings share a call",
    "darkroom": "`darkroom-server serve`, as it is",
}


def _goals(found: Sequence[Goal]) -> str:
    rows = [
        [
            goal.name,
            f"{'≥' if goal.at_least else '≤'} {goal.bound:g}",
            f"{goal.reached:.2f}",
            f"{goal.between[0]:.2f}–{goal.between[1]:.2f}" if goal.between else "",
            "yes" if goal.met else "**no**",
        ]
        for goal in found
    ]
    heads = ["Darkroom's figure over the other's", "goal", "reached", "between", "met"]
    return table(heads, rows)


def _scenarios(results: Results, *, closed: bool) -> list[str]:
    """Those in which Darkroom ran, beside all others that it was to run beside."""
    return [
        name
        for name, scenario in SCENARIOS.items()
        if (scenario.load is None) == closed and DARKROOM in runs_of(results, name)
    ]
