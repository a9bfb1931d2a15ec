"""Measures the engine beside ``pipe()``, in one run: ``python -m bench.engine``.

Three peers serve the same requests: ``pipe()`` for one request after another, ``pipe()`` for
batches of equal settings, and Darkroom's engine. Writes results, plots and a section of
``docs/benchmarks.md``. Then runs ``bench.engine.families``: tiny models of SDXL and FLUX.1.
"""

import argparse
from collections.abc import Sequence

from bench.engine.comparison import CALLERS, LONE_STEPS, Comparison
from bench.engine.families import main as families
from bench.engine.plots import plot
from bench.engine.report import goals, section
from bench.inprocess.remote import MAX_BATCH_IMAGES
from bench.report.benchmark import add_output_options
from bench.report.goals import print_goals
from bench.report.machine import this_machine, versions
from bench.report.markdown import write_section
from bench.report.results import Results, model_facts, save, today
from bench.workload.requests import mixed, poisson

LOADS = (0.7, 0.9)
"""Shares of the capacity of one call after another."""


def measure(options: argparse.Namespace) -> Results:
    """Run every scenario."""
    peers = Comparison(options.model)
    for round in range(options.rounds):
        peers.compete("closed", round, mixed(options.closed, options.seed + round), callers=CALLERS)
    capacity = peers.capacity("serial")
    for round in range(options.rounds):
        for load in LOADS:
            seed = options.seed + 100 + round
            requests = poisson(mixed(options.arrivals, seed), load * capacity, seed)
            peers.compete(f"open {load}", round, requests, rate=load * capacity)
    lone = peers.lone(options.pairs)
    peers.close()
    return Results(
        bench="engine",
        date=today(),
        machine=this_machine(),
        versions=versions(),
        model=model_facts(peers.info),
        settings={
            "rounds": options.rounds,
            "closed": options.closed,
            "arrivals": options.arrivals,
            "pairs": options.pairs,
            "seed": options.seed,
            "callers": CALLERS,
            "max_batch_images": MAX_BATCH_IMAGES,
            "lone_steps": LONE_STEPS,
        },
        figures={"passes": peers.batch_medians(), "lone": lone},
        runs=peers.runs,
        note=options.note,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then write the results, the plots and the section."""
    parser = argparse.ArgumentParser(prog="bench.engine", description=__doc__)
    parser.add_argument("--model", help="a pipeline folder; default: the demo model")
    parser.add_argument("--arrivals", type=int, default=300, help="of each open loop and round")
    parser.add_argument("--closed", type=int, default=160, help="requests of each closed loop")
    parser.add_argument("--pairs", type=int, default=60, help="lone requests of each peer")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    add_output_options(parser)
    options = parser.parse_args(arguments)
    if options.closed <= CALLERS:
        parser.error(f"--closed must be more than the {CALLERS} callers")
    results = measure(options)
    print(save(results, options.results).name)
    plot(results, options.docs / "images")
    write_section("benchmarks.md", "engine", section(results), options.docs)
    print_goals(goals(results))
    families(["--results", str(options.results), "--docs", str(options.docs)])


if __name__ == "__main__":
    main()
