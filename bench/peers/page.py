"""``docs/benchmarks.md``, the part on the peers: every figure comes from the results."""

from collections.abc import Sequence

from bench.goals import Goal
from bench.peers.figures import versions_text
from bench.peers.goals import goals
from bench.peers.roster import PEERS
from bench.peers.scenarios import SCENARIOS
from bench.peers.tables import closed_loop, drift, equality, lone, open_loop, resources
from bench.peers.windows import best, tried, windows_table
from bench.results import Results
from bench.sections import table
from bench.workload import STEPS


def page(results: Results, folder: str, plots: Sequence[tuple[str, str]]) -> str:
    """The section; ``plots`` are (file, caption), in ``folder`` as the page sees it."""
    shown = [
        f"![{caption.partition('.')[0]}]({folder}/{file})\n\n{caption}" for file, caption in plots
    ]
    parts = [
        "## Darkroom beside other servers",
        _setting(results),
        _goals(goals(results)),
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
    shares = ", ".join(f"{steps} steps {share:.0%}" for steps, share in STEPS.items())
    layout = ", channels last" if runtime["channels_last"] else ""
    peers = "\n".join(
        f"- {PEERS[name].label}: {text}; {versions_text(results.figures['versions'][name])}"
        for name, text in DESCRIPTIONS.items()
        if name in results.figures["versions"]
    )
    lost = "".join(f"\n\n{line}." for line in results.figures["lost"])
    note = f"\n\n{results.note}" if results.note else ""
    # Not those that were planned: a bench may have been cut short.
    rounds = 1 + max((run.round for run in results.runs), default=0)
    times = "one round" if rounds == 1 else f"{rounds} rounds: medians of them (least–greatest)"
    return (
        f"{results.date}, {results.machine.text}; {versions_text(results.versions)}. Model "
        f"`{results.model['id']}` ({results.model['width']}×{results.model['height']}, "
        f"{results.model['scheduler']}), all in {runtime['dtype']}, attention "
        f"{runtime['attention']}{layout}, on one thread that calls torch. At most "
        f"{settings['widest']} images share a call or a pass; a batch waits {_wait(results)} for "
        f"company.\n\n{peers}\n\n"
        f"The same requests for each, over the wire, PNG files back; mixed means {shares}, "
        "guidance 4 or 7.5. Latencies count from the scheduled arrival. Each run has a fresh "
        "server, warmed up by short requests, that has the machine to itself with the load's own "
        f"process; who goes first changes. {times.capitalize()}. Made by `python -m bench.peers`; "
        f"raw latencies in `bench/results/{results.name}.json`.{lost}{note}"
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
            "yes" if goal.met else "**no**",
        ]
        for goal in found
    ]
    return table(["Darkroom's figure over the other's", "goal", "reached", "met"], rows)


def _scenarios(results: Results, *, closed: bool) -> list[str]:
    met = {run.scenario for run in results.runs}
    return [
        name
        for name, scenario in SCENARIOS.items()
        if name in met and (scenario.load is None) == closed
    ]
