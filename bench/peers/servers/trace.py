"""A record of the calls of a server's model, one line of a file for each."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.workload.arrivals import Answer, Outcome


@dataclass(frozen=True, slots=True)
class Work:
    """One call of ``pipe()``, or one batch; ``began`` and ``ended`` are monotonic seconds.

    ``indexes`` are the requests that shared it.
    """

    began: float
    ended: float
    indexes: tuple[int, ...]

    def after(self, moment: float) -> float:
        """Its seconds after ``moment``."""
        return max(0.0, self.ended - max(self.began, moment))


class Trace:
    """Records calls in the file ``path``."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def record(self, seconds: float, indexes: Sequence[int], ended: float | None = None) -> None:
        """Record a call that took ``seconds`` and ended at ``ended``, None for now."""
        if ended is None:
            ended = time.monotonic()
        # Flush each time: the process may be killed.
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([ended - seconds, ended, list(indexes)]) + "\n")


def read_trace(path: Path, since: float) -> list[Work]:
    """The calls in ``path`` that began after ``since``."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    works = [Work(began, ended, tuple(each)) for began, ended, each in map(json.loads, lines)]
    return [work for work in works if work.began >= since]


def occupancy(works: Sequence[Work], start: float, seconds: float, bin: float) -> list[float]:
    """Mean number of images in the current call, for each ``bin`` seconds after ``start``."""
    bins = [0.0] * max(1, round(seconds / bin))
    for work in works:
        for place in range(len(bins)):
            low, high = start + place * bin, start + (place + 1) * bin
            shared = min(work.ended, high) - max(work.began, low)
            if shared > 0:
                bins[place] += len(work.indexes) * shared / bin
    return bins


def mean_width(works: Sequence[Work]) -> float:
    """Mean number of images in a call, weighted by the calls' seconds; 0 without calls."""
    busy = sum(work.ended - work.began for work in works)
    return sum(len(w.indexes) * (w.ended - w.began) for w in works) / busy if busy else 0.0


@dataclass(frozen=True, slots=True)
class Waste:
    """Seconds of work for requests that were cancelled or expired; a shared call counts by share.

    ``total`` is all of it, ``late`` the part after the end of the request, and ``last`` the part of
    ``late`` in calls that were running at that end. ``cancels`` is the number of these requests.
    """

    total: float
    late: float
    last: float
    cancels: int


def waste(works: Sequence[Work], answers: Sequence[Answer], start: float) -> Waste:
    """The waste of a run that began at ``start``."""
    ended = {
        each.index: start + each.arrival + each.latency
        for each in answers
        if each.outcome in (Outcome.CANCELLED, Outcome.EXPIRED)
    }
    total = late = last = 0.0
    for work in works:
        for index in work.indexes:
            if index not in ended:
                continue
            share = 1 / len(work.indexes)
            total += share * (work.ended - work.began)
            late += share * work.after(ended[index])
            if work.began <= ended[index]:
                last += share * work.after(ended[index])
    return Waste(total, late, last, len(ended))
