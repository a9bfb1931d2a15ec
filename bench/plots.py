"""The plots of the engine's bench, and what those of others share with them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt  # type: ignore[import-not-found,unused-ignore]

from bench.arrivals import Drawn
from bench.engine_page import pooled
from bench.goals import of_class
from bench.results import Results, Run
from bench.workload import STEPS

LABELS = {
    "serial": "pipe(), one at a time",
    "static": "pipe(), static batches",
    "engine": "Darkroom",
}
COLOURS = {"serial": "#9aa0a6", "static": "#5b8db8", "engine": "#c4442b"}
LOADS = ("open 0.7", "open 0.9")


def plot(results: Results, folder: Path) -> list[Path]:
    """Write the box plots by class and the distributions, as PNG files."""
    return [
        save(_classes(results), folder / f"{results.name}-classes.png"),
        save(_latencies(results), folder / f"{results.name}-latencies.png"),
    ]


def new_figure(panels: int, *, shared: bool = True) -> tuple[Any, Sequence[Any]]:
    """An empty figure with ``panels`` side by side, which may share their vertical axis."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, panels, figsize=(10, 4.2), sharey=shared, squeeze=False)
    return figure, list(axes[0])


def class_boxes(
    axis: Any, drawn: Mapping[str, Sequence[Drawn]], colours: Mapping[str, str]
) -> None:
    """Boxes from p25 to p75 with the median, whiskers from p5 to p95, a group for each class.

    The keys of ``drawn`` become labels.
    """
    step = 0.78 / len(drawn)
    for offset, (label, images) in enumerate(drawn.items()):
        colour = colours[label]
        axis.boxplot(
            [of_class(images, steps) for steps in STEPS],
            positions=[
                group + (offset - (len(drawn) - 1) / 2) * step for group in range(len(STEPS))
            ],
            widths=0.77 * step,
            whis=(5, 95),
            showfliers=False,
            patch_artist=True,
            boxprops={"facecolor": colour, "edgecolor": colour},
            medianprops={"color": "white", "linewidth": 1.8},
            whiskerprops={"color": colour, "linewidth": 1.4},
            capprops={"color": colour, "linewidth": 1.4},
            label=label,
        )
    axis.set_xticks(range(len(STEPS)), [f"{steps} steps" for steps in STEPS])
    axis.set_xlim(-0.5, len(STEPS) - 0.5)
    axis.grid(axis="y", color="#e3e3e3")
    axis.set_axisbelow(True)


def _classes(results: Results) -> Any:
    figure, axes = new_figure(len(LOADS))
    colours = {LABELS[name]: colour for name, colour in COLOURS.items()}
    for axis, scenario in zip(axes, LOADS, strict=True):
        runs = pooled(results, scenario)
        class_boxes(axis, {LABELS[name]: _drawn(runs[name]) for name in COLOURS}, colours)
        axis.set_title(_title(scenario), loc="left")
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("latency, seconds")
    axes[0].legend(frameon=False, loc="upper left")
    return figure


def _latencies(results: Results) -> Any:
    """The share of images that are there after so many seconds."""
    figure, axes = new_figure(len(LOADS))
    for axis, scenario in zip(axes, LOADS, strict=True):
        runs = pooled(results, scenario)
        for name, colour in COLOURS.items():
            latencies = sorted(of_class(_drawn(runs[name]), None))
            shares = [(i + 1) / len(latencies) for i in range(len(latencies))]
            axis.plot(latencies, shares, color=colour, linewidth=2.2, label=LABELS[name])
        axis.axhline(0.5, color="#cccccc", linewidth=0.8, zorder=0)
        axis.axhline(0.95, color="#cccccc", linewidth=0.8, zorder=0)
        axis.set_xscale("log")
        seconds_ticks(axis.xaxis)
        axis.set_title(_title(scenario), loc="left")
        axis.set_xlabel("latency, seconds")
    axes[0].set_yticks([0, 0.25, 0.5, 0.75, 0.95, 1], ["0", "25 %", "50 %", "75 %", "95 %", ""])
    axes[0].set_ylim(0, 1)
    axes[0].set_ylabel("images done")
    axes[1].legend(frameon=False, loc="lower right")
    return figure


def seconds_ticks(axis: Any) -> None:
    """Plain numbers on one logarithmic axis of seconds, as far as it goes."""
    low, high = axis.get_view_interval()
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= tick <= high]
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def _title(scenario: str) -> str:
    return f"Poisson arrivals, {float(scenario.split()[1]):.0%} of one-at-a-time capacity"


def _drawn(runs: Sequence[Run]) -> list[Any]:
    return [each for run in runs for each in run.drawn]


def save(figure: Any, path: Path) -> Path:
    """Write ``figure``, and be done with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
