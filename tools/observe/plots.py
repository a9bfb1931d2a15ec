"""The plots of one run: latency by stage, memory by rows, occupancy."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

from tools.observe.prometheus import Prometheus

STAGES = ("queue", "encode_prompt", "denoise", "decode", "encode_image")
COLOURS = ("#9aa0a6", "#7fb069", "#c4442b", "#5b8db8", "#e6aa68")
MIB = 2**20


def plot(scraped: Prometheus, begin: float, end: float, folder: Path) -> list[Path]:
    """Write the plots of the time from ``begin`` to ``end``, in seconds of ``time.time``."""
    mpl.use("Agg")
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _save(_latency(scraped), folder / "observe-latency.png"),
        _save(_memory(scraped), folder / "observe-memory.png"),
        _save(_occupancy(scraped, begin, end), folder / "observe-occupancy.png"),
    ]


def _latency(scraped: Prometheus) -> Any:
    """One bar: the mean latency, divided into its stages."""
    sums = scraped.query("sum by (stage) (darkroom_stage_seconds_sum)")
    counts = scraped.query("sum by (stage) (darkroom_stage_seconds_count)")
    figure, axis = plt.subplots(figsize=(8, 2.2), layout="constrained")
    left = 0.0
    for stage, colour in zip(STAGES, COLOURS, strict=True):
        key = (("stage", stage),)
        mean = sums[key] / counts[key]
        axis.barh(0, mean, left=left, color=colour, label=f"{stage} {mean * 1000:.1f} ms")
        left += mean
    axis.set_yticks([])
    axis.set_xlabel("mean seconds of a finished request")
    figure.legend(ncols=3, loc="outside upper center", frameon=False)
    return figure


def _memory(scraped: Prometheus) -> Any:
    """Weights by component, and peaks of batches by rows and of decodes."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    weights = scraped.query("darkroom_model_memory_bytes")
    names = [dict(labels)["component"] for labels in weights]
    left.bar(names, [size / MIB for size in weights.values()], color=COLOURS[3])
    left.set_ylabel("MiB")
    left.set_title("weights")
    bars = []
    for labels, size in scraped.query("darkroom_peak_memory_bytes").items():
        values = dict(labels)
        bars.append((int(values["size_class"]), int(values["rows"]), size))
    found = [(f"{edge} px, {rows} rows", size / MIB) for edge, rows, size in sorted(bars)]
    decodes = scraped.query("darkroom_decode_peak_memory_bytes").items()
    for edge, size in sorted((int(dict(labels)["size_class"]), size) for labels, size in decodes):
        found.append((f"{edge} px, decode", size / MIB))
    right.barh(range(len(found)), [size for _, size in found], color=COLOURS[2])
    right.set_yticks(range(len(found)), [name for name, _ in found])
    right.invert_yaxis()
    right.set_xlabel("MiB")
    right.set_title("highest peak without the weights")
    return figure


def _occupancy(scraped: Prometheus, begin: float, end: float) -> Any:
    """Occupancy of the batches and load of the engine, over the run."""
    figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for expression, label, colour in (
        (
            "sum(rate(darkroom_occupancy_ratio_sum[10s]))"
            " / sum(rate(darkroom_occupancy_ratio_count[10s]))",
            "rows of a batch, of its limit",
            COLOURS[2],
        ),
        ("sum(rate(darkroom_step_seconds_sum[10s]))", "engine busy with batches", COLOURS[3]),
    ):
        for points in scraped.over_time(expression, begin, end).values():
            axis.plot(*zip(*points, strict=True), color=colour, label=label)
    axis.set_ylim(0, 1.05)
    axis.set_xlabel("seconds of the run")
    axis.set_ylabel("ratio, over 10 s")
    figure.legend(ncols=2, loc="outside upper center", frameon=False)
    return figure


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
