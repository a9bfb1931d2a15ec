"""What a server was busy with, and for whom: one line of a file for each call of its model."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.arrivals import Drawn, Outcome


@dataclass(frozen=True, slots=True)
class Work:
    """One call of ``pipe()``, or one pass; ``began`` and ``ended`` by the monotonic clock.

    ``indexes`` are the requests that shared it.
    """

    began: float
    ended: float
    indexes: tuple[int, ...]

    def after(self, moment: float) -> float:
        """Seconds of it that lie after ``moment``."""
        return max(0.0, self.ended - max(self.began, moment))


class Trace:
    """Notes work in the file ``path``, as it is done."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def note(self, seconds: float, indexes: Sequence[int], ended: float | None = None) -> None:
        """What took ``seconds`` is done: just now, unless it ``ended`` before."""
        if ended is None:
            ended = time.monotonic()
        # Written out each time: the process may be killed.
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([ended - seconds, ended, list(indexes)]) + "\n")


def read_trace(path: Path, since: float) -> list[Work]:
    """The work in ``path`` that began after ``since``."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    works = [Work(began, ended, tuple(each)) for began, ended, each in map(json.loads, lines)]
    return [work for work in works if work.began >= since]


def occupancy(works: Sequence[Work], start: float, seconds: float, bin: float) -> list[float]:
    """Images in the call under way, at the mean of each ``bin`` seconds after ``start``."""
    bins = [0.0] * max(1, round(seconds / bin))
    for work in works:
        for place in range(len(bins)):
            low, high = start + place * bin, start + (place + 1) * bin
            shared = min(work.ended, high) - max(work.began, low)
            if shared > 0:
                bins[place] += len(work.indexes) * shared / bin
    return bins


def mean_width(works: Sequence[Work]) -> float:
    """Images in a call, at the mean over the time of the calls; 0 where there were none."""
    busy = sum(work.ended - work.began for work in works)
    return sum(len(w.indexes) * (w.ended - w.began) for w in works) / busy if busy else 0.0


@dataclass(frozen=True, slots=True)
class Waste:
    """Seconds of work for callers that left; shared calls are shared out evenly.

    ``total`` counts all of it, ``late`` what was done after the caller had left, and ``last`` of
    that the calls that were under way when it did. ``cancels`` callers left.
    """

    total: float
    late: float
    last: float
    cancels: int


def waste(works: Sequence[Work], drawn: Sequence[Drawn], start: float) -> Waste:
    """The waste of a run that began at ``start``."""
    left = {
        each.index: start + each.arrival + each.latency
        for each in drawn
        if each.outcome in (Outcome.CANCELLED, Outcome.EXPIRED)
    }
    total = late = last = 0.0
    for work in works:
        for index in work.indexes:
            if index not in left:
                continue
            share = 1 / len(work.indexes)
            total += share * (work.ended - work.began)
            late += share * work.after(left[index])
            if work.began <= left[index]:
                last += share * work.after(left[index])
    return Waste(total, late, last, len(left))
