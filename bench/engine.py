"""The engine beside ``pipe()``, in one run: ``python -m bench.engine``.

Three contenders draw the same requests: ``pipe()`` one call after another, ``pipe()`` on batches
of equal settings, and Darkroom's engine. Writes results, plots and ``docs/benchmarks.md``.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench.contender import WIDEST, Remote
from bench.engine_page import NAMES, goals, images_per_second, page
from bench.machine import model_source, this_machine, versions
from bench.pipelines import make_pipelines
from bench.results import RESULTS, Results, Run, model_facts, save, today
from bench.sections import DOCS, write_section
from bench.threaded import make_engine
from bench.workload import Request, mixed, poisson
from darkroom_server.core.engine_config import EngineConfig, Preset

CALLERS = 8
LOADS = (0.7, 0.9)
NOMINAL_STEPS = 20
LONE_STEPS = 16


class Bench:
    """The contenders, and what they drew so far."""

    def __init__(self, model: str | None, preset: Preset = Preset.AUTO) -> None:
        source = model_source(model)
        config = EngineConfig(models=(source,), max_rows=2 * WIDEST, preset=preset)
        engine = Remote(partial(make_engine, config))
        if engine.info is None:
            raise RuntimeError("the engine told nothing of its model")
        self.info = engine.info
        runtime = self.info.runtime
        self.remotes = {
            "serial": Remote(partial(make_pipelines, source.location, runtime, 1)),
            "static": Remote(partial(make_pipelines, source.location, runtime, WIDEST)),
            "engine": engine,
        }
        self.runs: list[Run] = []
        self.passes: list[tuple[int, float]] = []
        for remote in self.remotes.values():
            remote.warm_up()

    def compete(
        self,
        scenario: str,
        round: int,
        requests: Sequence[Request],
        *,
        rate: float | None = None,
        callers: int | None = None,
    ) -> None:
        """Let each draw ``requests``; who goes first changes each time."""
        names = list(NAMES)
        turn = len(self.runs) // len(names) % len(names)
        for name in names[turn:] + names[:turn]:
            before = self.nominal()
            report = self.remotes[name].draw(requests, callers)
            self.passes += report.passes
            run = Run(
                scenario=scenario,
                contender=name,
                round=round,
                nominal_before=before,
                nominal_after=self.nominal(),
                drawn=report.drawn,
                rate=rate,
                callers=callers,
            )
            self.runs.append(run)
            print(f"{scenario} round {round} {name}: {run.seconds:.1f} s", flush=True)

    def nominal(self) -> float:
        """Seconds of a step of a lone request: what the machine gives just now."""
        requests = [replace(r, steps=NOMINAL_STEPS) for r in mixed(3, seed=0)]
        drawn = self.remotes["serial"].draw(requests, callers=1).drawn
        return statistics.median(each.latency for each in drawn) / NOMINAL_STEPS

    def capacity(self, scenario: str = "closed") -> float:
        """Images/s of one call after another, in a closed loop."""
        return images_per_second(
            [r for r in self.runs if (r.scenario, r.contender) == (scenario, "serial")]
        )

    def lone(self, pairs: int, steps: int = LONE_STEPS) -> list[dict[str, float]]:
        """Seconds of one request alone, in turns, the first turn changing too."""
        found = []
        for index, request in enumerate(mixed(pairs, seed=1)):
            alone = [replace(request, steps=steps)]
            names = ("engine", "serial") if index % 2 else ("serial", "engine")
            seconds = {n: self.remotes[n].draw(alone, callers=1).drawn[0].latency for n in names}
            found.append({"engine": seconds["engine"], "pipe": seconds["serial"]})
        return found

    def close(self) -> None:
        """End the contenders' processes."""
        for remote in self.remotes.values():
            remote.close()

    def pass_medians(self) -> list[dict[str, float]]:
        """The engine's passes by their rows; those met fewer than ten times are left out."""
        by_rows: dict[int, list[float]] = {}
        for rows, seconds in self.passes:
            by_rows.setdefault(rows, []).append(seconds)
        return [
            {"rows": rows, "milliseconds": statistics.median(s) * 1000, "count": len(s)}
            for rows, s in sorted(by_rows.items())
            if len(s) >= 10
        ]


def measure(options: argparse.Namespace) -> Results:
    """Run every scenario."""
    bench = Bench(options.model)
    for round in range(options.rounds):
        bench.compete("closed", round, mixed(options.closed, options.seed + round), callers=CALLERS)
    capacity = bench.capacity()
    for round in range(options.rounds):
        for load in LOADS:
            seed = options.seed + 100 + round
            requests = poisson(mixed(options.arrivals, seed), load * capacity, seed)
            bench.compete(f"open {load}", round, requests, rate=load * capacity)
    lone = bench.lone(options.pairs)
    bench.close()
    return Results(
        bench="engine",
        date=today(),
        machine=this_machine(),
        versions=versions(),
        model=model_facts(bench.info),
        settings={
            "rounds": options.rounds,
            "closed": options.closed,
            "arrivals": options.arrivals,
            "pairs": options.pairs,
            "seed": options.seed,
            "callers": CALLERS,
            "widest": WIDEST,
            "lone_steps": LONE_STEPS,
        },
        figures={"passes": bench.pass_medians(), "lone": lone},
        runs=bench.runs,
        note=options.note,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then write the results, the plots and the page."""
    parser = argparse.ArgumentParser(prog="bench.engine", description=__doc__)
    parser.add_argument("--model", help="a pipeline folder; the demo model unless told")
    parser.add_argument("--arrivals", type=int, default=300, help="of each open loop and round")
    parser.add_argument("--closed", type=int, default=160, help="requests of each closed loop")
    parser.add_argument("--pairs", type=int, default=60, help="lone requests of each")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="a sentence for the page, on the circumstances")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args(arguments)
    if options.closed <= CALLERS:
        parser.error(f"--closed must be more than the {CALLERS} callers")
    results = measure(options)
    print(save(results, options.results).name)
    publish(results, options.docs)
    for goal in goals(results):
        print(f"{'met' if goal.met else 'MISSED':7}{goal.name}: {goal.reached:.3f}")


def publish(results: Results, docs: Path) -> None:
    """Write the plots and the page."""
    from bench.plots import plot

    plot(results, docs / "images")
    write_section("benchmarks.md", "Benchmarks", "engine", page(results, "images"), docs)


if __name__ == "__main__":
    main()
