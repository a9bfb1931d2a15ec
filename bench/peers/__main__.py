"""Darkroom beside the servers that people would use instead: ``python -m bench.peers``.

The peers' environments are made by ``make bench``. Writes results, plots and
``docs/benchmarks.md``.
"""

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.arrivals import Outcome
from bench.contender import WIDEST
from bench.machine import model_source, this_machine, versions
from bench.peers.bench import LONE_STEPS, PeersBench, Plan
from bench.peers.goals import goals
from bench.peers.page import page
from bench.peers.plots import plot
from bench.peers.roster import PEERS, SERIAL, WORK, Peer
from bench.peers.scenarios import CALLERS, FULL, QUICK, SCENARIOS, Scenario
from bench.peers.windows import TRIED, USUAL
from bench.results import RESULTS, Results, load, model_facts, save, today
from bench.sections import DOCS, write_section


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then write the results, the plots and the page."""
    options = _options(arguments)
    if options.page:
        publish([load(path) for path in options.page], options.docs)
        return
    # So that a bench that is told to end takes its servers with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    plan = _plan(options)
    earlier = _earlier(options, plan)
    # Of the beginning: a long bench passes midnight.
    date = earlier.date if earlier else today()
    peer_versions = {name: _versions(PEERS[name]) for name in plan.peers}
    runs = earlier.runs if earlier else []
    bench = PeersBench(model_source(options.model), plan, lambda: keep(), runs)

    def results() -> Results:
        return Results(
            bench="everything" if options.full else "peers",
            date=date,
            machine=this_machine(),
            versions=versions(),
            model=model_facts(bench.info),
            settings=_settings(plan),
            figures={
                "versions": {name: peer_versions[name] for name in bench.equality},
                "equality": bench.equality,
                "lost": bench.lost,
            },
            runs=bench.runs,
            note=options.note,
        )

    def keep() -> None:
        """After each run, so that a bench cut short has something to show for it."""
        save(results(), options.results)

    try:
        bench.check()
        bench.run()
    finally:
        bench.close()
    path = save(results(), options.results)
    print(path.name)
    found = load(path)
    publish([found], options.docs)
    for goal in goals([found]):
        print(f"{'met' if goal.met else 'MISSED':7}{goal.name}: {goal.reached:.3f}")
    if options.smoke:
        _smoke_ends(found, plan)


def publish(every: Sequence[Results], docs: Path) -> None:
    """Write the plots and the page of one bench, or of several."""
    plots = [plot(results, docs / "images") for results in every]
    write_section("benchmarks.md", "Benchmarks", "peers", page(every, "images", plots), docs)


def _settings(plan: Plan) -> dict[str, Any]:
    """What all runs of a bench have in common."""
    return {
        "rounds": plan.rounds,
        "closed": plan.closed,
        "arrivals": plan.arrivals,
        "pairs": plan.pairs,
        "seed": plan.seed,
        "callers": CALLERS,
        "widest": WIDEST,
        "window_seconds": plan.window,
        "windows_tried": list(plan.windows),
        "lone_steps": LONE_STEPS,
    }


def _earlier(options: argparse.Namespace, plan: Plan) -> Results | None:
    """What is to be gone on with; ends the program where it does not fit."""
    if options.resume is None:
        return None
    earlier = load(options.resume)
    # More windows may be tried than before.
    of_then, of_now = (
        {**settings, "windows_tried": None} for settings in (earlier.settings, _settings(plan))
    )
    if (of_then, earlier.machine) != (of_now, this_machine()):
        sys.exit(
            f"{options.resume} was made with other settings, or on another machine: make results "
            "of this one, and a page of both by --page"
        )
    return earlier


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.peers", description=__doc__)
    parser.add_argument("--full", action="store_true", help="every scenario, three rounds: hours")
    parser.add_argument("--smoke", action="store_true", help="a handful of each, into bench/work")
    parser.add_argument("--model", help="a pipeline folder; the demo model unless told")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, metavar="SCENARIO")
    parser.add_argument("--rounds", type=int, help="3 of the full bench, else 1")
    parser.add_argument("--arrivals", type=int, help="of each open loop and round")
    parser.add_argument("--closed", type=int, help="requests of each closed loop")
    parser.add_argument("--pairs", type=int, help="lone requests of each peer and round")
    parser.add_argument(
        "--window", type=float, default=USUAL, help="seconds that a batch waits for company"
    )
    parser.add_argument(
        "--windows",
        type=float,
        nargs="*",
        metavar="SECONDS",
        help="try these first, and give each server its best; the full bench tries "
        f"{', '.join(map(str, TRIED))} unless told",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="a sentence for the page, on the circumstances")
    parser.add_argument("--resume", type=Path, metavar="RESULTS", help="go on where these end")
    parser.add_argument(
        "--page", type=Path, nargs="+", metavar="RESULTS", help="only write the page anew, of these"
    )
    parser.add_argument("--results", type=Path)
    parser.add_argument("--docs", type=Path)
    options = parser.parse_args(arguments)
    if SERIAL not in options.peers:
        parser.error(f"--peers needs {SERIAL}: the loads are shares of its capacity")
    if options.closed is not None and options.closed <= CALLERS:
        parser.error(f"--closed must be more than the {CALLERS} callers")
    apart = WORK / "smoke" if options.smoke else None
    options.results = options.results or apart or RESULTS
    options.docs = options.docs or apart or DOCS
    missing = [p.environment for p in map(PEERS.get, options.peers) if p and not p.python.exists()]
    if missing and not options.page:
        parser.error(
            f"no environment for {', '.join(missing)}: 'make bench-peers-setup' makes them"
        )
    return options


def _plan(options: argparse.Namespace) -> Plan:
    """What was asked for; what was not is for 15 minutes, or for as long as it takes."""
    usual = {"rounds": 1, "closed": 96, "arrivals": 200, "pairs": 50}
    if options.full:
        usual = {"rounds": 3, "closed": 160, "arrivals": 200, "pairs": 20}
    if options.smoke:
        usual = {"rounds": 1, "closed": 16, "arrivals": 12, "pairs": 2}
    amounts = {
        name: usual[name] if getattr(options, name) is None else getattr(options, name)
        for name in usual
    }
    scenarios = [SCENARIOS[name] for name in options.scenarios or ()]
    scenarios = scenarios or list(FULL if options.full else QUICK)
    # The loads are shares of the closed loop's capacity, which must come first.
    closed = [Scenario(mix=mix) for mix in dict.fromkeys(each.mix for each in scenarios)]
    scenarios = closed + [each for each in scenarios if each not in closed]
    usual_windows = TRIED if options.full and not options.smoke else ()
    return Plan(
        peers=options.peers,
        scenarios=scenarios,
        seed=options.seed,
        window=options.window,
        windows=usual_windows if options.windows is None else options.windows,
        **amounts,
    )


def _versions(peer: Peer) -> dict[str, str]:
    """Of what makes the peer, in its own environment."""
    code = (
        "from importlib.metadata import version; print(*map(version, __import__('sys').argv[1:]))"
    )
    names = (*peer.packages, "diffusers", "torch")
    told = subprocess.run(
        [str(peer.python), "-c", code, *names], check=True, capture_output=True, text=True
    )
    return dict(zip(names, told.stdout.split(), strict=True))


def _smoke_ends(results: Results, plan: Plan) -> None:
    """Fail where anything did."""
    failed = sum(d.outcome is Outcome.FAILED for run in results.runs for d in run.drawn)
    if failed or results.figures["lost"] or len(results.figures["equality"]) < len(plan.peers):
        sys.exit(f"{failed} requests failed; lost: {results.figures['lost']}")


if __name__ == "__main__":
    main()
