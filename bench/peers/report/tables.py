"""The tables of the peers' section."""

import math
from collections.abc import Mapping, Sequence

from bench.peers.batch_timeout_search import CLOSE, best, tried
from bench.peers.registry import PEERS
from bench.peers.report.figures import (
    Figure,
    cpu_seconds_per_image,
    goodput,
    images,
    images_per_second,
    late_steps_per_cancel,
    latency_of,
    lone_ratios,
    median_of,
    ratios,
    rounds_of,
    runs_of,
    spread,
)
from bench.peers.scenarios import CALLERS, CLOSED, PATIENCE, SCENARIOS
from bench.report.markdown import table
from bench.report.results import Results, Run
from bench.report.statistics import bootstrap_median, quantile
from bench.workload.arrivals import Outcome

GIB = 2**30


def lone(results: Results) -> str:
    """The latency of a lone request, and its time to the first progress."""
    ratios = {name: found for name, found in lone_ratios(results).items() if found}
    if not ratios:
        return ""
    rows = []
    for name, found in ratios.items():
        runs = runs_of(results, CLOSED.name)[name]
        seconds = [pair["peer"] for run in runs for pair in run.figures["lone"]]
        first = [s for run in runs for s in run.figures.get("first_progress", [])]
        ratio = bootstrap_median(found)
        rows.append(
            [
                PEERS[name].label,
                f"{quantile(seconds, 0.5) * 1000:.0f}",
                f"{ratio.value:.3f}",
                f"{ratio.low:.3f}–{ratio.high:.3f}",
                f"{quantile(first, 0.5) * 1000:.0f}" if first else "none",
            ]
        )
    count = max(len(found) for found in ratios.values())
    heads = ["", "ms", "over bare `pipe()`", "95 % interval", "first progress, ms"]
    return (
        f"#### A lone request\n\n{count} interleaved pairs of {results.settings['lone_steps']} "
        "steps with a bare `pipe()`, which runs beside the idle server: a server that uses CPU "
        f"time when idle slows it down too. Medians.\n\n{table(heads, rows)}"
    )


def closed_loop(results: Results, scenario: str) -> str:
    """A closed loop."""
    rounds = rounds_of(results, scenario)
    runs = runs_of(results, scenario)
    rows = [
        [
            PEERS[name].label,
            spread([images_per_second(run) for run in each]),
            _ratio(rounds, name, images_per_second, most=True),
            spread([run.figures["width"] for run in each]),
            *_latencies(each),
        ]
        for name, each in runs.items()
    ]
    heads = ["", "images/s", "to the best other peer", "images a call", *_heads(runs)]
    mix = SCENARIOS[scenario].mix.text_of(next(iter(runs.values()))[0].answers)
    return (
        f"#### Closed loop, {CALLERS} callers, {mix}\n\nEach caller sends the next request "
        "when it receives its images. p50 / p95 / p99 in seconds. Images a call: mean number in a "
        f"call (batch), weighted by its time.\n\n{table(heads, rows)}"
    )


def open_loop(results: Results, scenario: str) -> str:
    """An open loop."""
    what = SCENARIOS[scenario]
    rounds = rounds_of(results, scenario)
    runs = runs_of(results, scenario)
    first = next(iter(runs.values()))
    rates = spread([run.rate or 0.0 for run in first])
    tail = latency_of(None, 0.95)
    columns: dict[str, Figure] = {}
    if len(first) > 1:
        columns["p95 of all, over the rounds"] = tail
    kind = "in bursts of 8" if what.bursts else "Poisson"
    words = [f"{len(first[0].answers)} arrivals a round at {rates} per second, {kind}"]
    if what.deadlines:
        columns["images/s in time"] = goodput
        words.append(f"each with a deadline of {PATIENCE:g} times what it takes alone")
    if what.cancels:
        columns["steps after a cancel"] = late_steps_per_cancel
        columns["seconds for cancelled requests"] = lambda run: run.figures["waste"]["total"]
        words.append("one request in five is cancelled")
    if what.stream:
        words.append("streamed")
    rows = [
        [
            PEERS[name].label,
            *_latencies(each),
            _ratio(rounds, name, tail, most=False),
            *(spread([figure(run) for run in each]) for figure in columns.values()),
            *([_first(each)] if what.stream else []),
            _endings(each),
        ]
        for name, each in runs.items()
        if images(each)
    ]
    heads = ["", *_heads(runs), "p95 to the best other peer", *columns]
    heads += ["first progress, p50 / p95", "no image"] if what.stream else ["no image"]
    title = ", ".join([what.mix.text_of(first[0].answers), *scenario.split()[2:]])
    return (
        f"#### Open loop, {title}, {what.load:.0%} of (a)'s capacity\n\n"
        f"{'; '.join(words)}. p50 / p95 / p99 in seconds.\n\n{table(heads, rows)}"
    )


def _ratio(rounds: Sequence[Mapping[str, Run]], name: str, figure: Figure, *, most: bool) -> str:
    found = ratios(rounds, figure, most=most, name=name)
    return spread(found, unit="×") if found else ""


def _heads(runs: Mapping[str, Sequence[Run]]) -> list[str]:
    return ["all", *(f"{steps} steps" for steps in _classes(next(iter(runs.values()))))]


def _classes(runs: Sequence[Run]) -> list[int]:
    steps = sorted({each.steps for run in runs for each in run.answers})
    return steps if len(steps) > 1 else []


def _latencies(runs: Sequence[Run]) -> list[str]:
    """p50, p95 and p99 of all and by class, each the median of the rounds."""
    cells = []
    for steps in (None, *_classes(runs)):
        found = [median_of(runs, latency_of(steps, share)) for share in (0.5, 0.95, 0.99)]
        cells.append(
            " / ".join(f"{each:.2f}" for each in found) if math.inf not in found else "none"
        )
    return cells


def _first(runs: Sequence[Run]) -> str:
    first = [d.first_progress for d in images(runs) if d.first_progress is not None]
    if not first:
        return "none"
    return " / ".join(f"{quantile(first, share):.2f}" for share in (0.5, 0.95))


def _endings(runs: Sequence[Run]) -> str:
    counts = {
        outcome: sum(each.outcome is outcome for run in runs for each in run.answers)
        for outcome in Outcome
        if outcome is not Outcome.IMAGE
    }
    return ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count) or "0"


def resources(results: Results) -> str:
    """Start, memory and CPU time."""
    rows = []
    for name in PEERS:
        runs = [run for run in results.runs if run.peer == name and images([run])]
        if not runs:
            continue
        prints = [run.figures["footprint"] for run in runs]
        ready, firsts, idle = (
            [run.figures[name] for run in runs if name in run.figures]
            for name in ("ready_seconds", "first_image_seconds", "idle_cpu")
        )
        rows.append(
            [
                PEERS[name].label,
                spread(ready, 1) if ready else "",
                spread(firsts) if firsts else "",
                spread([each["proportional"] / GIB for each in prints]),
                spread([each["resident"] / GIB for each in prints]),
                str(max(each["processes"] for each in prints)),
                spread([cpu_seconds_per_image(run) for run in runs if run.scenario == CLOSED.name])
                if any(run.scenario == CLOSED.name for run in runs)
                else "",
                spread([each * 100 for each in idle], 0) if idle else "",
            ]
        )
    heads = ["", "ready, s", "first image, s", "PSS, GiB", "RSS, GiB", "processes"]
    heads += ["CPU s/image", "idle, % of a core"]
    measured = sorted({r.figures["max_rows"] for r in results.runs if "max_rows" in r.figures})
    return (
        "#### Resources\n\nSeconds from the start of the process until its health check passes "
        "(Darkroom has measured the model and warmed up by then), and then to the first image of 8 "
        "steps; memory of all processes at the end of a run; CPU seconds of the mixed closed loop; "
        "share of a core used without requests. Over all runs. The row limit of a batch that "
        "Darkroom measured at its starts: "
        f"{', '.join(map(str, measured))}.\n\n{table(heads, rows)}"
    )


def equality(results: Results) -> str:
    """How the images compare."""
    rows = [
        [
            PEERS[name].label,
            f"{found['identical']} of {found['alone']}",
            str(found["largest"]),
            _decibels(found["lowest_psnr"]),
            f"{found['together_identical']} of {found['together']}",
            _decibels(found["together_lowest_psnr"]),
        ]
        for name, found in results.figures["equality"].items()
    ]
    heads = ["", "files identical", "largest difference", "PSNR", "at once: identical", "PSNR"]
    return (
        "#### Equality of the images\n\nFirst, each peer generates the same requests, and the "
        "images are compared with those of a bare `pipe()`: one after another, then all at once, "
        "when batches change the last bits. The largest difference is of a channel, 0 to 255; "
        f"the PSNR is the lowest.\n\n"
        f"{table(heads, rows)}"
    )


def _decibels(ratio: float | None) -> str:
    return "equal" if ratio is None else f"{ratio:.1f} dB"


def drift(results: Results) -> str:
    """The speed of the machine around each run."""
    rows = []
    for name in PEERS:
        steps = [
            seconds * 1000
            for run in results.runs
            if run.peer == name
            for seconds in (run.nominal_before, run.nominal_after)
        ]
        if steps:
            middle = quantile(steps, 0.5)
            rows.append(
                [PEERS[name].label, f"{middle:.1f}", f"{min(steps):.1f}", f"{max(steps):.1f}"]
            )
    return (
        "#### The machine\n\nBefore and after each run a bare `pipe()` generates lone requests: "
        "milliseconds of a step, by the peer of the run.\n\n"
        + table(["", "median", "minimum", "maximum"], rows)
    )


def batch_timeouts(results: Results) -> str:
    """The batch timeouts that were tried; empty if none were."""
    found = tried(results.runs)
    if not found:
        return ""
    timeouts = sorted({timeout for rates in found.values() for timeout in rates})
    rows = [
        [PEERS[name].label, *(_rate(rates, timeout) for timeout in timeouts)]
        for name, rates in found.items()
    ]
    heads = ["images/s", *(f"{timeout * 1000:g} ms" for timeout in timeouts)]
    return (
        "#### Batch timeout\n\nHow long a batch waits to fill, tried first, in the mixed closed "
        f"loop. Each peer then gets the shortest timeout that reached {CLOSE:.0%} of its most "
        f"images/s, in bold.\n\n{table(heads, rows)}"
    )


def _rate(rates: Mapping[float, float], timeout: float) -> str:
    if timeout not in rates:
        return ""
    text = f"{rates[timeout]:.2f}"
    return f"**{text}**" if timeout == best(rates) else text
