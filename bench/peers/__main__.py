"""Measures Darkroom beside other servers: ``python -m bench.peers``.

``make bench-peers-setup`` installs the environments of the peers. Writes results, plots and a
section of ``docs/benchmarks.md``.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.inprocess.remote import MAX_BATCH_IMAGES
from bench.peers.alone import REPEATS
from bench.peers.batch_timeout_search import DEFAULT, TRIED
from bench.peers.bench import LONE_STEPS, PeersBench, Plan
from bench.peers.process import versions_of
from bench.peers.registry import COMPILED_SUFFIX, EAGER, PEERS, SERIAL, WORK
from bench.peers.report.goals import goals
from bench.peers.report.section import write_page
from bench.peers.scenarios import CALLERS, FULL, QUICK, SCENARIOS, UNIFORM, Scenario
from bench.report.goals import print_goals
from bench.report.machine import model_source, this_machine, versions
from bench.report.markdown import DOCS
from bench.report.results import RESULTS, Results, load, model_facts, save, today
from bench.workload.arrivals import Outcome


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then write the results, the plots and the page."""
    options = _options(arguments)
    # Exit normally, so that the servers are stopped too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    plan = _plan(options)
    earlier = _earlier(options, plan)
    # The date of the start: a long benchmark passes midnight.
    date = earlier.date if earlier else today()
    peer_versions = {name: versions_of(PEERS[name]) for name in plan.peers}
    runs = earlier.runs if earlier else []
    bench = PeersBench(model_source(options.model), plan, lambda: save_runs(), runs)

    def results() -> Results:
        return Results(
            # Runs of one day on one machine are in files of their own.
            bench="everything" if options.full else "compiled" if options.compiled else "peers",
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

    def save_runs() -> None:
        """Called after each run, so that an interrupted benchmark keeps its results."""
        save(results(), options.results)

    try:
        bench.check()
        bench.run()
    finally:
        bench.close()
    path = save(results(), options.results)
    print(path.name)
    found = load(path)
    write_page([found], options.docs)
    print_goals(goals([found]))
    if options.smoke:
        _check_smoke(found, plan)


def _settings(plan: Plan) -> dict[str, Any]:
    """What all runs of a benchmark have in common."""
    return {
        "standing": True,
        "rounds": plan.rounds,
        "closed": plan.closed,
        "arrivals": plan.arrivals,
        "pairs": plan.pairs,
        "seed": plan.seed,
        "callers": CALLERS,
        "max_batch_images": MAX_BATCH_IMAGES,
        "batch_timeout_seconds": plan.batch_timeout,
        "batch_timeouts_tried": list(plan.batch_timeouts),
        "lone_steps": LONE_STEPS,
        "uniform_steps": UNIFORM[0],
        "alone_repeats": REPEATS,
    }


def _earlier(options: argparse.Namespace, plan: Plan) -> Results | None:
    """The results to continue, None for a new benchmark; exits if they do not fit the plan."""
    if options.resume is None:
        return None
    earlier = load(options.resume)
    # The batch timeouts are tried only once.
    before, now = (
        {**settings, "batch_timeouts_tried": None}
        for settings in (earlier.settings, _settings(plan))
    )
    if (before, earlier.machine) != (now, this_machine()):
        sys.exit(
            f"{options.resume} was made with other settings or on another machine: start without "
            "--resume, and write a page of both with python -m bench.pages --peers"
        )
    return earlier


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.peers", description=__doc__)
    parser.add_argument("--full", action="store_true", help="every scenario, three rounds: hours")
    parser.add_argument(
        "--smoke", action="store_true", help="a few requests of each, into bench/work"
    )
    parser.add_argument("--model", help="a pipeline folder; default: the demo model")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(EAGER), metavar="PEER")
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="each peer once more with the UNet that Darkroom compiles for this machine",
    )
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, metavar="SCENARIO")
    parser.add_argument("--rounds", type=int, help="default: 3 with --full, else 1")
    parser.add_argument("--arrivals", type=int, help="of each open loop and round")
    parser.add_argument("--closed", type=int, help="requests of each closed loop")
    parser.add_argument("--pairs", type=int, help="lone requests of each peer and round")
    parser.add_argument(
        "--batch-timeout",
        type=float,
        default=DEFAULT,
        metavar="SECONDS",
        help="how long a batch waits to fill",
    )
    parser.add_argument(
        "--batch-timeouts",
        type=float,
        nargs="*",
        metavar="SECONDS",
        help="try these first and give each server the best; default with --full: "
        f"{', '.join(map(str, TRIED))}",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="a sentence for the page about this run")
    parser.add_argument(
        "--resume", type=Path, metavar="RESULTS", help="continue these interrupted results"
    )
    parser.add_argument("--results", type=Path)
    parser.add_argument("--docs", type=Path)
    options = parser.parse_args(arguments)
    if options.compiled:
        twins = [f"{name}{COMPILED_SUFFIX}" for name in options.peers if name in EAGER]
        options.peers = list(dict.fromkeys([*options.peers, *twins]))
    if SERIAL not in options.peers:
        parser.error(f"--peers needs {SERIAL}: the loads are shares of its capacity")
    if options.closed is not None and options.closed <= CALLERS:
        parser.error(f"--closed must be more than the {CALLERS} callers")
    smoke = WORK / "smoke" if options.smoke else None
    options.results = options.results or smoke or RESULTS
    options.docs = options.docs or smoke or DOCS
    missing = [p.environment for p in map(PEERS.get, options.peers) if p and not p.python.exists()]
    if missing:
        parser.error(
            f"no environment for {', '.join(missing)}: 'make bench-peers-setup' installs them"
        )
    return options


def _plan(options: argparse.Namespace) -> Plan:
    """The options, with defaults for 15 minutes, for --full or for --smoke."""
    defaults = {"rounds": 1, "closed": 64, "arrivals": 80, "pairs": 50}
    if options.full:
        defaults = {"rounds": 3, "closed": 160, "arrivals": 200, "pairs": 20}
    if options.smoke:
        defaults = {"rounds": 1, "closed": 24, "arrivals": 12, "pairs": 2}
    amounts = {
        name: defaults[name] if getattr(options, name) is None else getattr(options, name)
        for name in defaults
    }
    scenarios = [SCENARIOS[name] for name in options.scenarios or ()]
    scenarios = scenarios or list(FULL if options.full else QUICK)
    # The loads are shares of the closed loop's capacity, which is measured first.
    closed = [Scenario(mix=mix) for mix in dict.fromkeys(each.mix for each in scenarios)]
    scenarios = closed + [each for each in scenarios if each not in closed]
    default_timeouts = TRIED if options.full and not options.smoke else ()
    return Plan(
        peers=options.peers,
        scenarios=scenarios,
        seed=options.seed,
        batch_timeout=options.batch_timeout,
        batch_timeouts=(
            default_timeouts if options.batch_timeouts is None else options.batch_timeouts
        ),
        **amounts,
    )


def _check_smoke(results: Results, plan: Plan) -> None:
    """Exit with an error if anything failed."""
    failed = sum(d.outcome is Outcome.FAILED for run in results.runs for d in run.answers)
    if failed or results.figures["lost"] or len(results.figures["equality"]) < len(plan.peers):
        sys.exit(f"{failed} requests failed; lost: {results.figures['lost']}")


if __name__ == "__main__":
    main()
