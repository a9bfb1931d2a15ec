"""The peers' section of ``docs/benchmarks.md``, from one benchmark or from several."""

from collections.abc import Sequence
from pathlib import Path

from bench.peers.batch_timeout_search import best, tried
from bench.peers.registry import COMPILED, DARKROOM, PEERS
from bench.peers.report.figures import runs_of
from bench.peers.report.goals import goals
from bench.peers.report.plots import plot
from bench.peers.report.slo import slo_table
from bench.peers.report.summary_table import summary_table
from bench.peers.report.tables import (
    batch_timeouts,
    closed_loop,
    drift,
    equality,
    lone,
    open_loop,
    resources,
)
from bench.peers.scenarios import SCENARIOS
from bench.report.markdown import (
    goals_table,
    join,
    layout_words,
    provenance,
    versions_text,
    write_section,
)
from bench.report.results import Results
from bench.workload.requests import STEPS

Plots = Sequence[tuple[str, str]]
"""(file, caption) of each."""

DESCRIPTIONS = {
    "grpc": "the usual gRPC service, a pool of threads before one caller of `pipe()`",
    "litserve": "batches, within which equal settings share a call of `pipe()`",
    "ray": "`@serve.batch`, one queue for each combination of settings",
    "triton": "nvidia-pytriton, dynamic batching, within which equal settings share a call",
    "darkroom": "`darkroom-server serve`, unchanged",
}


def write_page(every: Sequence[Results], docs: Path) -> None:
    """Write the plots and the section of ``every``."""
    plots = [plot(results, docs / "images") for results in every]
    write_section("benchmarks.md", "peers", section(every, "images", plots), docs)


def section(every: Sequence[Results], folder: str, plots: Sequence[Plots]) -> str:
    """The Markdown; ``plots`` are those of each results, in ``folder`` relative to the page."""
    return join(
        [
            "## Darkroom beside other servers",
            _method(every),
            goals_table("Darkroom's figure over the other's", goals(every)),
            summary_table(every),
            *(_of_one(results, folder, shown) for results, shown in zip(every, plots, strict=True)),
        ]
    )


def _method(every: Sequence[Results]) -> str:
    """The peers and the method, which are the same for each of ``every``."""
    shares = ", ".join(f"{steps} steps {share:.0%}" for steps, share in STEPS.items())
    took_part = {name for results in every for name in results.figures["versions"]}
    peers = "\n".join(
        f"- {PEERS[name].label}: {text}" for name, text in DESCRIPTIONS.items() if name in took_part
    )
    if took_part & COMPILED.keys():
        peers += (
            "\n\nCompiled: with the UNet that Darkroom's engine compiled for this machine, the "
            "same file for each. The best other peer of those is the best compiled one, and of the "
            "others the best eager one. A bare `pipe()` is eager."
        )
    return (
        f"{peers}\n\nAll peers get the same requests over the wire and return PNG files; mixed "
        f"means {shares}, guidance 4 or 7.5. Latencies count from the scheduled arrival. The "
        "peers take turns, and which one is first changes; meanwhile the servers of the others "
        "stand still (SIGSTOP), unless stated otherwise. Short requests warm a server up. It "
        "shares the machine only with the process that generates the load. A ratio is taken "
        "within a round, to the best other peer: the one with which the median of the ratios is "
        "worst. Of a scenario that was measured again the goals and the summary have the newest "
        "rounds. A request for several images is one call of `pipe()` in (a), as many requests at "
        "once to (b) and (c), and as many rows of one request to (d), so that their batches are "
        "full."
    )


def _of_one(results: Results, folder: str, plots: Plots) -> str:
    """All that one benchmark measured."""
    return join(
        [
            f"### {results.machine.text}, {results.date}",
            provenance(results, "python -m bench.peers"),
            _setting(results),
            *(f"{line}." for line in results.figures["lost"]),
            results.note,
            *(
                f"![{caption.partition('.')[0]}]({folder}/{file})\n\n{caption}"
                for file, caption in plots
            ),
            slo_table(results),
            lone(results),
            *(closed_loop(results, name) for name in _scenarios(results, closed=True)),
            *(open_loop(results, name) for name in _scenarios(results, closed=False)),
            batch_timeouts(results),
            resources(results),
            equality(results),
            drift(results),
        ]
    )


def _setting(results: Results) -> str:
    runtime, settings = results.model["runtime"], results.settings
    peers = "; ".join(
        f"{PEERS[name].label}: {versions_text(versions)}"
        for name, versions in results.figures["versions"].items()
    )
    # The rounds that were run: the benchmark may have been interrupted.
    rounds = 1 + max((run.round for run in results.runs), default=0)
    times = "One round" if rounds == 1 else f"{rounds} rounds: their median (minimum–maximum)"
    new = "" if settings.get("standing") else " Each run had a new server."
    return (
        f"Model `{results.model['id']}` ({results.model['width']}×{results.model['height']}, "
        f"{results.model['scheduler']}), all in {runtime['dtype']}, attention "
        f"{runtime['attention']}{layout_words(runtime)}, on one thread that calls torch. At most "
        f"{settings['max_batch_images']} images share a call or a batch; a batch waits "
        f"{_timeouts(results)} to fill. {times}.{new} {peers}."
    )


def _timeouts(results: Results) -> str:
    """The best batch timeouts of those tried, or the one that was set."""
    chosen = [
        f"{best(rates) * 1000:g} ms ({PEERS[name].label})"
        for name, rates in tried(results.runs).items()
    ]
    return ", ".join(chosen) or f"{results.settings['batch_timeout_seconds'] * 1000:g} ms"


def _scenarios(results: Results, *, closed: bool) -> list[str]:
    """The open or closed scenarios that Darkroom ran beside all other peers."""
    return [
        name
        for name, scenario in SCENARIOS.items()
        if (scenario.load is None) == closed and DARKROOM in runs_of(results, name)
    ]
