"""What a run of the trace says: how many requests were in time, and what the swaps cost."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report.statistics import quantile
from bench.workload.arrivals import Answer, Outcome

WITHIN = (2, 5, 10)
"""A request is in time if its images come within that multiple of what it takes alone."""

JUDGED = 5
"""The multiple of the goals, and of the goodput."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Swaps:
    """The loads of a run; ``longest_wait``: of a job for its model, in seconds."""

    loads: int
    from_disk: int
    bytes_moved: int
    seconds: float
    longest_wait: float


def read_swaps(path: Path) -> Swaps:
    """The loads of a server, which it has written."""
    return Swaps(**json.loads(path.read_text(encoding="utf-8")))


def figures_of(
    answers: Sequence[Answer], alone: Mapping[int, float], swaps: Swaps
) -> dict[str, Any]:
    """The figures of a run, in JSON's types; ``alone``: seconds of each request by its index."""
    images = [each for each in answers if each.outcome is Outcome.IMAGE]
    seconds = max(each.arrival + each.latency for each in answers)
    latencies = [each.latency for each in images]
    in_time = {k: [a for a in images if a.latency <= k * alone[a.index]] for k in WITHIN}
    return {
        "requests": len(answers),
        "failed": len(answers) - len(images),
        "seconds": round(seconds, 3),
        "attainment": {str(k): round(len(in_time[k]) / len(answers), 4) for k in WITHIN},
        "goodput": round(sum(each.images for each in in_time[JUDGED]) / seconds, 4),
        "images_per_second": round(sum(each.images for each in images) / seconds, 4),
        "latency": {
            f"p{share:g}": round(quantile(latencies, share / 100), 3) if latencies else math.nan
            for share in (50, 95, 99)
        },
        "loads": swaps.loads,
        "from_disk": swaps.from_disk,
        "bytes_moved": swaps.bytes_moved,
        "loading": round(swaps.seconds / seconds, 4),
        "longest_wait": round(swaps.longest_wait, 3),
    }
