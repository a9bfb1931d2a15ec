"""``docs/benchmarks.md``, the part on the engine: every figure comes from the results."""

from collections.abc import Sequence

from bench.goals import Goal, latency_goals, lone_goal, of_class, throughput_goals
from bench.quantiles import bootstrap_median, quantile
from bench.results import Results, Run
from bench.sections import table
from bench.workload import STEPS

NAMES = {
    "serial": "(a) `pipe()`, one call after another",
    "static": "(b) `pipe()`, batches of equal settings",
    "engine": "(c) Darkroom's engine",
}


def pooled(results: Results, scenario: str) -> dict[str, list[Run]]:
    """The runs of a scenario, by contender."""
    return {
        name: [r for r in results.runs if (r.scenario, r.contender) == (scenario, name)]
        for name in NAMES
    }


def images_per_second(runs: Sequence[Run]) -> float:
    """Of closed loops, while every caller was there."""
    return sum(run.drawn_while_busy for run in runs) / sum(run.busy_seconds for run in runs)


def goals(results: Results) -> list[Goal]:
    """Every goal, with what was reached."""
    closed = {name: images_per_second(runs) for name, runs in pooled(results, "closed").items()}
    busiest = {
        name: [each for run in runs for each in run.drawn]
        for name, runs in pooled(results, "open 0.9").items()
    }
    ratios = [pair["engine"] / pair["pipe"] for pair in results.figures["lone"]]
    return [
        *throughput_goals(closed),
        *latency_goals(busiest),
        lone_goal(bootstrap_median(ratios).value),
    ]


def page(results: Results, images: str) -> str:
    """The section; ``images`` is the folder of the plots as the page sees it."""
    return "\n\n".join(
        [
            "## Continuous batching beside `pipe()`",
            _setting(results),
            _goals(results),
            f"![latency by class]({images}/{results.name}-classes.png)\n\n"
            "Boxes from p25 to p75, the white line is the median; whiskers from p5 to p95.",
            f"![share of images by latency]({images}/{results.name}-latencies.png)",
            _closed(results),
            *(_open(results, scenario) for scenario in ("open 0.7", "open 0.9")),
            _lone(results),
            _drift(results),
        ]
    )


def _setting(results: Results) -> str:
    runtime, settings = results.model["runtime"], results.settings
    shares = ", ".join(f"{steps} steps {share:.0%}" for steps, share in STEPS.items())
    packages = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    layout = ", channels last" if runtime["channels_last"] else ""
    note = f"\n\n{results.note}" if results.note else ""
    return (
        f"{results.date}, {results.machine.text}; {packages}. Model `{results.model['id']}` "
        f"({results.model['width']}×{results.model['height']}, {results.model['scheduler']}), all "
        f"three in {runtime['dtype']}, attention {runtime['attention']}{layout}, with the same "
        f"number of torch threads, each in a process of its own in which one thread calls torch. "
        f"At most {settings['widest']} images share a pass or a call.\n\n"
        f"The same requests for each: {shares}; guidance 4 or 7.5; PNG out. A latency counts from "
        "the scheduled arrival to the encoded image. The contenders take turns in changing order, "
        f"{settings['rounds']} rounds. Made by `python -m bench.engine`; the raw latencies are in "
        f"`bench/results/{results.name}.json`.{note}"
    )


def _goals(results: Results) -> str:
    rows = [
        [
            goal.name,
            f"{'≥' if goal.at_least else '≤'} {goal.bound:g}×",
            f"{goal.reached:.2f}×",
            "yes" if goal.met else "**no**",
        ]
        for goal in goals(results)
    ]
    heads = ["ratio (latencies in the open loop at 0.9)", "goal", "reached", "met"]
    return table(heads, rows)


def _closed(results: Results) -> str:
    runs = pooled(results, "closed")
    rows = [
        [NAMES[name], f"{images_per_second(runs[name]):.2f}", *_latencies(runs[name])]
        for name in NAMES
    ]
    callers = results.settings["callers"]
    return (
        f"### Closed loop, {callers} callers\n\nEach caller asks for the next image when it has "
        "its last one. Images/s until the last request is asked for; p50 / p95 / p99 in seconds."
        f"\n\n{table(['', 'images/s', *_heads()], rows)}"
    )


def _open(results: Results, scenario: str) -> str:
    runs = pooled(results, scenario)
    load = float(scenario.split()[1])
    rate = runs["engine"][0].rate or 0.0
    arrivals = sum(len(run.drawn) for run in runs["engine"])
    rows = [[NAMES[name], *_latencies(runs[name])] for name in NAMES]
    return (
        f"### Open loop, {load:.0%} of what (a) can do\n\n{arrivals} Poisson arrivals at "
        f"{rate:.2f} a second. p50 / p95 / p99 in seconds.\n\n{table(['', *_heads()], rows)}"
    )


def _heads() -> list[str]:
    return ["all", *(f"{steps} steps" for steps in STEPS)]


def _latencies(runs: Sequence[Run]) -> list[str]:
    drawn = [each for run in runs for each in run.drawn]
    return [
        " / ".join(f"{quantile(of_class(drawn, steps), share):.2f}" for share in (0.5, 0.95, 0.99))
        for steps in (None, *STEPS)
    ]


def _lone(results: Results) -> str:
    pairs = results.figures["lone"]
    ratio = bootstrap_median([pair["engine"] / pair["pipe"] for pair in pairs])
    ours, bare = (
        quantile([pair[name] for pair in pairs], 0.5) * 1000 for name in ("engine", "pipe")
    )
    return (
        f"### A lone request\n\n{len(pairs)} interleaved pairs of "
        f"{results.settings['lone_steps']} steps: {ours:.0f} ms in the engine, {bare:.0f} ms by "
        f"bare `pipe()` (medians); median ratio {ratio.value:.3f}, 95 % interval "
        f"{ratio.low:.3f} to {ratio.high:.3f}."
    )


def _drift(results: Results) -> str:
    nominal = [s * 1000 for r in results.runs for s in (r.nominal_before, r.nominal_after)]
    passes = [
        [str(each["rows"] // 2), f"{each['milliseconds']:.1f}", str(each["count"])]
        for each in results.figures["passes"]
    ]
    return (
        "### The machine\n\nBefore and after each run a lone request was drawn by (a): "
        f"{quantile(nominal, 0.5):.1f} ms a step at the median of {len(nominal)}, "
        f"{min(nominal):.1f} at least, {max(nominal):.1f} at most. The engine's passes in these "
        "runs (medians):\n\n" + table(["images in a pass", "ms", "passes"], passes)
    )
