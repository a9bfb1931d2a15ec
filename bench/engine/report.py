"""The engine's section of ``docs/benchmarks.md``."""

from collections.abc import Sequence

from bench.report.goals import Goal, latency_goals, lone_goal, of_class, throughput_goals
from bench.report.markdown import goals_table, join, layout_words, provenance, table
from bench.report.results import Results, Run
from bench.report.statistics import bootstrap_median, quantile
from bench.workload.requests import STEPS

NAMES = {
    "serial": "(a) `pipe()`, one call after another",
    "static": "(b) `pipe()`, batches of equal settings",
    "engine": "(c) Darkroom's engine",
}


def pooled(results: Results, scenario: str) -> dict[str, list[Run]]:
    """The runs of a scenario, by peer."""
    return {
        name: [r for r in results.runs if (r.scenario, r.peer) == (scenario, name)]
        for name in NAMES
    }


def images_per_second(runs: Sequence[Run]) -> float:
    """Images/s of closed loops, while every caller is busy and has had an answer."""
    return sum(run.images_while_busy for run in runs) / sum(run.busy_seconds for run in runs)


def goals(results: Results) -> list[Goal]:
    """Every goal, with what was reached."""
    closed = {name: images_per_second(runs) for name, runs in pooled(results, "closed").items()}
    busiest = {
        name: [each for run in runs for each in run.answers]
        for name, runs in pooled(results, "open 0.9").items()
    }
    ratios = [pair["engine"] / pair["pipe"] for pair in results.figures["lone"]]
    return [
        *throughput_goals(closed),
        *latency_goals(busiest),
        lone_goal(bootstrap_median(ratios).value),
    ]


def section(results: Results, images: str = "images") -> str:
    """The Markdown; ``images`` is the folder of the plots, relative to the page."""
    return join(
        [
            "## Continuous batching beside `pipe()`",
            provenance(results, "python -m bench.engine"),
            _method(results),
            results.note,
            goals_table("ratio (latencies in the open loop at 0.9)", goals(results), "×"),
            f"![latency by class]({images}/{results.name}-classes.png)",
            "Boxes from p25 to p75, the white line is the median; whiskers from p5 to p95.",
            f"![share of images by latency]({images}/{results.name}-latencies.png)",
            _closed(results),
            *(_open(results, scenario) for scenario in ("open 0.7", "open 0.9")),
            _lone(results),
            _drift(results),
        ]
    )


def _method(results: Results) -> str:
    runtime, settings = results.model["runtime"], results.settings
    shares = ", ".join(f"{steps} steps {share:.0%}" for steps, share in STEPS.items())
    return (
        f"Model `{results.model['id']}` ({results.model['width']}×{results.model['height']}, "
        f"{results.model['scheduler']}), all three in {runtime['dtype']}, attention "
        f"{runtime['attention']}{layout_words(runtime)}, with the same number of torch threads. "
        "Each runs in a process of its own, in which one thread calls torch. At most "
        f"{settings['max_batch_images']} images share a batch or a call.\n\n"
        f"All three get the same requests: {shares}; guidance 4 or 7.5; PNG output. A latency "
        "counts from the scheduled arrival to the encoded image. The three take turns in changing "
        f"order, {settings['rounds']} rounds."
    )


def _closed(results: Results) -> str:
    runs = pooled(results, "closed")
    rows = [
        [NAMES[name], f"{images_per_second(runs[name]):.2f}", *_latencies(runs[name])]
        for name in NAMES
    ]
    callers = results.settings["callers"]
    return (
        f"### Closed loop, {callers} callers\n\nEach caller sends the next request when it "
        "receives an image. Images/s until the last request is sent; p50 / p95 / p99 in seconds."
        f"\n\n{table(['', 'images/s', *_heads()], rows)}"
    )


def _open(results: Results, scenario: str) -> str:
    runs = pooled(results, scenario)
    load = float(scenario.split()[1])
    rate = runs["engine"][0].rate or 0.0
    arrivals = sum(len(run.answers) for run in runs["engine"])
    rows = [[NAMES[name], *_latencies(runs[name])] for name in NAMES]
    return (
        f"### Open loop, {load:.0%} of the capacity of (a)\n\n{arrivals} Poisson arrivals at "
        f"{rate:.2f} per second. p50 / p95 / p99 in seconds.\n\n{table(['', *_heads()], rows)}"
    )


def _heads() -> list[str]:
    return ["all", *(f"{steps} steps" for steps in STEPS)]


def _latencies(runs: Sequence[Run]) -> list[str]:
    answers = [each for run in runs for each in run.answers]
    return [
        " / ".join(
            f"{quantile(of_class(answers, steps), share):.2f}" for share in (0.5, 0.95, 0.99)
        )
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
    batches = [
        [str(each["rows"] // 2), f"{each['milliseconds']:.1f}", str(each["count"])]
        for each in results.figures["passes"]
    ]
    return (
        "### The machine\n\nBefore and after each run (a) served lone requests: "
        f"{quantile(nominal, 0.5):.1f} ms a step at the median of {len(nominal)}, minimum "
        f"{min(nominal):.1f}, maximum {max(nominal):.1f}. The engine's batches in these runs "
        "(medians):\n\n" + table(["images in a batch", "ms", "batches"], batches)
    )
