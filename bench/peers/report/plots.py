"""The plots of the peers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.peers.registry import COMPILED_SUFFIX, DARKROOM, PEERS
from bench.peers.report.figures import images, latency_of, median_of, runs_of
from bench.peers.report.slo import attainment, slo_runs
from bench.peers.scenarios import BUSY, SCENARIOS, WITHIN, Mix
from bench.report.goals import SHORT
from bench.report.plots import class_boxes, new_figure, save, seconds_ticks
from bench.report.results import Results

COLOURS = {
    "grpc": "#9aa0a6",
    "litserve": "#5b8db8",
    "ray": "#2e5f8a",
    "triton": "#7fb08a",
    DARKROOM: "#c4442b",
}


COMPILED_LINE = "--"


def _colour(name: str) -> str:
    """The colour of a peer, whether its UNet is compiled or not."""
    return COLOURS[name.removesuffix(COMPILED_SUFFIX)]


def plot(results: Results, folder: Path) -> list[tuple[str, str]]:
    """Write the plots that the results allow as PNG files; returns (file, caption) of each."""
    plots = (
        (
            "load",
            _load,
            "Latency against load, mixed, Poisson arrivals: medians of the shortest class, and "
            "p95 of all. The load is a share of the capacity of (a); the seconds are logarithmic.",
        ),
        (
            "slo",
            _slo,
            "SLO attainment against load, mixed, Poisson arrivals: the share of requests within 2, "
            "5 and 10 times what they take alone in a bare `pipe()`. The load is a share of the "
            "capacity of (a).",
        ),
        (
            "classes",
            _classes,
            "Latency by class at 90 % of (a)'s capacity. Boxes from p25 to p75, the white line is "
            "the median; whiskers from p5 to p95; the seconds are logarithmic.",
        ),
        (
            "occupancy",
            _occupancy,
            "Images in the current call or batch, mean of each second, at 90 % of (a)'s capacity: "
            "the same arrivals for each.",
        ),
    )
    written = []
    for name, plot_of, caption in plots:
        figure = plot_of(results)
        if figure is not None:
            file = f"{results.name}-{name}.png"
            save(figure, folder / file)
            written.append((file, caption))
    return written


def _load(results: Results) -> Any:
    """None with fewer than two loads."""
    plain = {
        scenario.load or 0.0: name
        for name, scenario in SCENARIOS.items()
        if scenario.is_plain and scenario.mix is Mix.MIXED and runs_of(results, name)
    }
    if len(plain) < 2:
        return None
    figure, axes = new_figure(2, shared=False)
    for axis, title, steps, share in (
        (axes[0], f"{SHORT} steps: p50", SHORT, 0.5),
        (axes[1], "all: p95", None, 0.95),
    ):
        for name in COLOURS:
            points = [
                (load, median_of(runs_of(results, scenario)[name], latency_of(steps, share)))
                for load, scenario in sorted(plain.items())
                if name in runs_of(results, scenario)
            ]
            _line(axis, name, points)
        axis.set_xticks(sorted(plain), [f"{load:g}" for load in sorted(plain)])
        axis.set_title(title, loc="left")
        axis.set_xlabel("load")
        axis.set_yscale("log")
        seconds_ticks(axis.yaxis)
        axis.grid(axis="y", color="#e3e3e3")
    axes[0].set_ylabel("latency, seconds")
    axes[0].legend(frameon=False, loc="upper left")
    return figure


def _slo(results: Results) -> Any:
    """None with fewer than two loads."""
    loads = {
        SCENARIOS[name].load or 0.0: runs
        for name, runs in slo_runs(results).items()
        if SCENARIOS[name].mix is Mix.MIXED
    }
    if len(loads) < 2:
        return None
    figure, axes = new_figure(len(WITHIN))
    for axis, times in zip(axes, WITHIN, strict=True):
        for name in COLOURS:
            points = [
                (load, 100 * median_of(runs[name], attainment(times)))
                for load, runs in loads.items()
                if name in runs
            ]
            _line(axis, name, points)
        axis.set_title(f"within {times} times alone", loc="left")
        axis.set_xticks(list(loads), [f"{load:g}" for load in loads])
        axis.set_xlabel("load")
        axis.set_ylim(0, 102)
        axis.grid(axis="y", color="#e3e3e3")
    axes[0].set_ylabel("requests, %")
    # Beside the lines of all three.
    axes[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _line(axis: Any, name: str, points: Sequence[tuple[float, float]]) -> None:
    """The line of one peer through ``points``, Darkroom's wider."""
    if points:
        width = 2.6 if PEERS[name].is_darkroom else 1.6
        style = COMPILED_LINE if PEERS[name].compiled else "-"
        line = {"color": _colour(name), "linewidth": width, "linestyle": style}
        line |= {"marker": "o", "markersize": 4}
        axis.plot(*zip(*points, strict=True), label=PEERS[name].label, **line)


def _classes(results: Results) -> Any:
    answers = {
        PEERS[name].label: images(runs) for name, runs in runs_of(results, BUSY.name).items()
    }
    if not answers:
        return None
    figure, axes = new_figure(1)
    class_boxes(axes[0], answers, {peer.label: _colour(name) for name, peer in PEERS.items()})
    axes[0].set_yscale("log")
    seconds_ticks(axes[0].yaxis)
    axes[0].set_ylabel("latency, seconds")
    axes[0].legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(answers))
    return figure


def _occupancy(results: Results) -> Any:
    """One panel for each peer, of the first round."""
    runs = runs_of(results, BUSY.name)
    if not runs:
        return None
    longest = max(len(each[0].figures["occupancy"]) for each in runs.values())
    figure, axes = _stacked(len(runs))
    for axis, (name, each) in zip(axes, runs.items(), strict=True):
        occupied = each[0].figures["occupancy"]
        axis.fill_between(
            range(len(occupied)), occupied, step="post", color=_colour(name), linewidth=0
        )
        mean = sum(occupied) / len(occupied)
        axis.set_title(f"{PEERS[name].label}: mean {mean:.1f}", loc="left", fontsize=9)
        axis.set_ylim(0, results.settings["max_batch_images"])
        axis.set_yticks(
            [0, results.settings["max_batch_images"] // 2, results.settings["max_batch_images"]]
        )
        axis.set_xlim(0, longest)
    axes[-1].set_xlabel("seconds")
    return figure


def _stacked(panels: int) -> tuple[Any, Sequence[Any]]:
    import matplotlib.pyplot as plt  # type: ignore[import-not-found,unused-ignore]

    figure, axes = plt.subplots(
        panels, 1, figsize=(10, 1.15 * panels + 0.6), sharex=True, squeeze=False
    )
    return figure, [row[0] for row in axes]
