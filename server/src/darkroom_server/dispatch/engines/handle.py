"""One engine, the jobs in it, and how fast it is."""

from collections import deque
from dataclasses import dataclass

from darkroom_server.core.engine import Engine
from darkroom_server.core.events import (
    BatchDone,
    DecodeDone,
    EngineReady,
    Event,
    JobFinished,
    MemoryReport,
    SampleProgress,
)
from darkroom_server.core.model import ModelInfo
from darkroom_server.dispatch.estimation.batch_times import BatchTimeModel, Group
from darkroom_server.dispatch.estimation.remaining_work import RemainingWorkCache
from darkroom_server.dispatch.estimation.simulation import Load
from darkroom_server.dispatch.jobs.job import ActiveJob


@dataclass(frozen=True, slots=True)
class Death:
    """When an engine died, by the monotonic clock; ``attributed_to_job`` by one of its jobs."""

    at: float
    attributed_to_job: bool


class EngineHandle:
    """One engine, and the jobs in it.

    ``memory`` is what it told last, ``passes`` are how many it took, ``last_rows`` those of the
    last one. ``healthy_since_crash``: it finished a job since a death was last attributed to one.
    ``loaded`` says that it was ready once, ``given_up`` that it is never started again.
    """

    def __init__(self, index: int, engine: Engine) -> None:
        self.index = index
        self.engine = engine
        self.ready = False
        self.loaded = False
        self.given_up = False
        self.restarts = 0
        self.deaths: deque[Death] = deque()
        self.healthy_since_crash = True
        self.jobs: dict[str, ActiveJob] = {}
        self.models: dict[str, ModelInfo] = {}
        self.speed = BatchTimeModel()
        self.memory: MemoryReport | None = None
        self.passes = 0
        self.last_rows = 0
        self._left: dict[str, dict[int, int]] = {}
        self._lowered: dict[Group, int] = {}
        self._works = RemainingWorkCache()

    @property
    def samples(self) -> int:
        """Images in the engine."""
        return sum(accepted.job.image_count for accepted in self.jobs.values())

    @property
    def isolated(self) -> bool:
        """A job is in it that was running when an engine died: nobody shares its fate."""
        return any(accepted.crashes for accepted in self.jobs.values())

    def load(self) -> Load:
        """What the forecast needs to know."""
        works = self._works.of(self.jobs.values(), self._left)
        return Load(
            speed=self.speed, max_rows=self._max_rows, jobs=[work for work in works if work.passes]
        )

    def take(self, accepted: ActiveJob) -> None:
        """Give the engine a job, less the images that an earlier one finished."""
        self.jobs[accepted.job.id] = accepted
        self.engine.submit(accepted.remaining_job())

    def left(self, job_id: str) -> None:
        """Note that the engine has let a job go."""
        self.jobs.pop(job_id, None)
        self._left.pop(job_id, None)

    def lose(self) -> list[ActiveJob]:
        """Note that the engine died; returns the jobs that were in it."""
        self.ready = False
        victims, self.jobs = list(self.jobs.values()), {}
        self._left.clear()
        self._lowered.clear()
        return victims

    def learn(self, event: Event) -> None:
        """Note how far the jobs are, and how long it took."""
        match event:
            case EngineReady(models):
                self.models = {model.id: model for model in models}
                for model in models:
                    self.speed.start(model)
            case BatchDone():
                self.passes += 1
                self.last_rows = event.rows
                self.speed.passed(event)
                self._bound(event)
                # The prompts of whoever is in are encoded by now.
                for encoded in self.jobs.values():
                    encoded.taken = False
            case DecodeDone():
                self.speed.decoded(event)
            case SampleProgress():
                if event.job_id in self.jobs:
                    left = self._left.setdefault(event.job_id, {})
                    left[event.image_index] = event.steps - event.step
            case JobFinished(job_id, stages):
                self.healthy_since_crash = True
                if accepted := self.jobs.get(job_id):
                    self.speed.finished(accepted.job, stages)
            case MemoryReport():
                self.memory = event

    def _bound(self, done: BatchDone) -> None:
        """Note where the engine allows fewer rows than at start: memory ran out meanwhile."""
        group = Group(done.model, done.width, done.height)
        if 0 < done.max_rows < self._rows_at_start(group):
            self._lowered[group] = done.max_rows
        else:
            self._lowered.pop(group, None)

    def _max_rows(self, group: Group) -> int:
        """Rows that a pass may have, as the engine bounds it too."""
        at_start = self._rows_at_start(group)
        return min(at_start, self._lowered.get(group, at_start))

    def _rows_at_start(self, group: Group) -> int:
        model = self.models.get(group.model)
        if model is None:
            return 2
        return model.rows_of_a_pass(group.width, group.height)
