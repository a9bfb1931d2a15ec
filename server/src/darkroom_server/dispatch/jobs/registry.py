"""Every job that waits or is in an engine."""

import bisect
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from darkroom_server.core.order import Urgency, urgency
from darkroom_server.dispatch.jobs.job import ActiveJob, JobState

HALF_LIFE_SECONDS = 600.0
"""After that time an arrival counts half: what was asked for long ago says little."""

SHORTEST_SECONDS = 30.0
"""Rates are those of at least this time, so that the first arrivals do not look like many."""


@dataclass(slots=True)
class Demand:
    """How often a model is asked for: its arrivals, each with a weight that halves with time."""

    weight: float = 0.0
    at: float = 0.0

    def record(self, now: float) -> None:
        """A job arrived at ``now``, in seconds."""
        self.weight, self.at = self.now(now) + 1.0, now

    def now(self, now: float) -> float:
        """The sum of the weights at ``now``."""
        return float(self.weight * 0.5 ** (max(0.0, now - self.at) / HALF_LIFE_SECONDS))

    def rate(self, now: float, since: float) -> float:
        """Arrivals per second at ``now``; none were recorded before ``since``.

        At most one in the time since the last arrival.
        """
        seconds = max(now - since, SHORTEST_SECONDS)
        # The weight of one arrival in each second until now.
        full = HALF_LIFE_SECONDS / math.log(2.0) * (1.0 - 0.5 ** (seconds / HALF_LIFE_SECONDS))
        return float(min(self.now(now) / full, 1.0 / max(now - self.at, 1e-3)))


class JobRegistry:
    """Jobs by id, and the queue among them.

    An id stays in use until the engine has removed the job, whether or not a caller still wants it.
    The queue is kept in its order: a new job is put into its place when somebody asks next.
    ``demand``: how often each model is asked for. ``last_used``: when a job of a model arrived or
    left, in ``time.monotonic`` seconds.
    """

    def __init__(self) -> None:
        self._jobs: dict[str, ActiveJob] = {}
        self._queue: dict[str, ActiveJob] = {}
        self._new: dict[str, ActiveJob] = {}
        self._urgency: dict[str, Urgency] = {}
        self._order: list[Urgency] = []
        self._here: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()
        self._since = time.monotonic()
        self.demand: defaultdict[str, Demand] = defaultdict(Demand)
        self.last_used: dict[str, float] = {}

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._jobs

    def get(self, job_id: str) -> ActiveJob | None:
        """The job ``job_id``, None if it is not here."""
        return self._jobs.get(job_id)

    def all(self) -> list[ActiveJob]:
        """Every job, in the order of arrival."""
        return list(self._jobs.values())

    def queue(self, new: ActiveJob | None = None) -> list[ActiveJob]:
        """The waiting jobs, with ``new`` as if it waited too; most urgent first."""
        if len(self._queue) + (new is not None) < 2:
            return list(self._queue.values()) if new is None else [new]
        for id, active in self._new.items():
            self._urgency[id] = place = urgency(active.key())
            bisect.insort(self._order, place)
        self._new.clear()
        waiting = [self._queue[id] for _, _, (id, _) in self._order]
        if new is not None:
            waiting.insert(bisect.bisect(self._order, urgency(new.key())), new)
        return waiting

    def waiting(self) -> Iterable[ActiveJob]:
        """The waiting jobs in any order."""
        return self._queue.values()

    def rate(self, model: str) -> float:
        """Jobs of ``model`` that arrive per second."""
        return self.demand[model].rate(time.monotonic(), self._since)

    @property
    def queued(self) -> int:
        """The number of waiting jobs."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """The number of jobs in engines, including those about to be removed."""
        return len(self._jobs) - len(self._queue)

    def counts(self, model: str) -> tuple[int, int]:
        """The waiting and the running jobs of ``model``; any thread may ask."""
        waiting = self._waiting[model]
        return waiting, self._here[model] - waiting

    def enqueue(self, active: ActiveJob) -> None:
        """Add a job to the queue: a new one, or one that runs again."""
        id, model = active.job.id, active.job.model
        if id not in self._jobs:
            self._jobs[id] = active
            self._here[model] += 1
            self.last_used[model] = now = time.monotonic()
            self.demand[model].record(now)
        self._queue[id] = active
        self._waiting[model] += 1
        self._new[id] = active
        active.state = JobState.QUEUED

    def reorder(self, active: ActiveJob) -> None:
        """The deadline of a job has changed, which may wait."""
        if active.job.id in self._queue:
            self._take_out(active.job.id)
            self._new[active.job.id] = active

    def assign(self, active: ActiveJob) -> None:
        """Move a job from the queue to an engine."""
        self._dequeue(active)
        active.state = JobState.ASSIGNED

    def remove(self, active: ActiveJob) -> None:
        """Remove a job, from the queue or after its engine removed it."""
        self._dequeue(active)
        del self._jobs[active.job.id]
        self._here[active.job.model] -= 1
        self.last_used[active.job.model] = time.monotonic()

    def _dequeue(self, active: ActiveJob) -> None:
        if self._queue.pop(active.job.id, None) is not None:
            self._waiting[active.job.model] -= 1
            self._take_out(active.job.id)
            active.position = None

    def _take_out(self, id: str) -> None:
        """Remove a job from the order of the queue."""
        if self._new.pop(id, None) is None:
            del self._order[bisect.bisect_left(self._order, self._urgency.pop(id))]
