"""What the plots of all benchmarks share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt  # type: ignore[import-not-found,unused-ignore]

from bench.report.goals import of_class
from bench.workload.arrivals import Answer
from bench.workload.requests import STEPS


def new_figure(panels: int, *, shared: bool = True) -> tuple[Any, Sequence[Any]]:
    """An empty figure of ``panels`` side by side, which may share their vertical axis."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, panels, figsize=(10, 4.2), sharey=shared, squeeze=False)
    return figure, list(axes[0])


def class_boxes(
    axis: Any, answers: Mapping[str, Sequence[Answer]], colours: Mapping[str, str]
) -> None:
    """Boxes from p25 to p75 with the median, whiskers from p5 to p95, one group for each class.

    The keys of ``answers`` become labels.
    """
    step = 0.78 / len(answers)
    for offset, (label, images) in enumerate(answers.items()):
        colour = colours[label]
        axis.boxplot(
            [of_class(images, steps) for steps in STEPS],
            positions=[
                group + (offset - (len(answers) - 1) / 2) * step for group in range(len(STEPS))
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


def seconds_ticks(axis: Any) -> None:
    """Plain numbers as ticks of a logarithmic axis of seconds, within its limits."""
    low, high = axis.get_view_interval()
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= tick <= high]
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def save(figure: Any, path: Path) -> Path:
    """Write ``figure`` as PNG and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
