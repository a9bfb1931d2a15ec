"""The plots of the engine beside ``pipe()``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.engine.report import pooled
from bench.report.goals import of_class
from bench.report.plots import class_boxes, new_figure, save, seconds_ticks
from bench.report.results import Results, Run
from bench.workload.arrivals import Answer

LABELS = {
    "serial": "pipe(), one at a time",
    "static": "pipe(), static batches",
    "engine": "Darkroom",
}
COLOURS = {"serial": "#9aa0a6", "static": "#5b8db8", "engine": "#c4442b"}
LOADS = ("open 0.7", "open 0.9")


def plot(results: Results, folder: Path) -> list[Path]:
    """Write the box plots by class and the distributions as PNG files."""
    return [
        save(_classes(results), folder / f"{results.name}-classes.png"),
        save(_latencies(results), folder / f"{results.name}-latencies.png"),
    ]


def _classes(results: Results) -> Any:
    figure, axes = new_figure(len(LOADS))
    colours = {LABELS[name]: colour for name, colour in COLOURS.items()}
    for axis, scenario in zip(axes, LOADS, strict=True):
        runs = pooled(results, scenario)
        class_boxes(axis, {LABELS[name]: _answers(runs[name]) for name in COLOURS}, colours)
        axis.set_title(_title(scenario), loc="left")
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("latency, seconds")
    axes[0].legend(frameon=False, loc="upper left")
    return figure


def _latencies(results: Results) -> Any:
    """The share of images that are ready after a number of seconds."""
    figure, axes = new_figure(len(LOADS))
    for axis, scenario in zip(axes, LOADS, strict=True):
        runs = pooled(results, scenario)
        for name, colour in COLOURS.items():
            latencies = sorted(of_class(_answers(runs[name]), None))
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


def _title(scenario: str) -> str:
    return f"Poisson arrivals, {float(scenario.split()[1]):.0%} of one-at-a-time capacity"


def _answers(runs: Sequence[Run]) -> list[Answer]:
    return [each for run in runs for each in run.answers]
