"""One engine, the jobs in it, and its batch times."""

import math
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass

from darkroom_server.core.engine import Engine
from darkroom_server.core.events import BatchDone, Correction, EngineReady, MemoryReport
from darkroom_server.core.model import ModelInfo
from darkroom_server.core.model_events import ModelLoad, ModelUnloaded
from darkroom_server.core.residency import largest_batch_bytes, resident_bytes, sharing
from darkroom_server.dispatch.adapters import AdapterKey
from darkroom_server.dispatch.estimation.batch_times import BatchTimeModel, Group
from darkroom_server.dispatch.estimation.processor_sharing import finish_seconds
from darkroom_server.dispatch.estimation.remaining_work import (
    RemainingWork,
    RemainingWorkCache,
    remaining_work,
)
from darkroom_server.dispatch.estimation.simulation import Load
from darkroom_server.dispatch.jobs.job import ActiveJob, JobState
from darkroom_server.dispatch.models.residency import NOTHING, Shared, held_bytes


@dataclass(frozen=True, slots=True)
class Death:
    """When an engine died (``time.monotonic`` seconds), and whether a job or a load explains it."""

    at: float
    explained: bool


@dataclass(frozen=True, slots=True)
class ModelLoading:
    """A model that an engine loads since ``began``, in ``time.monotonic`` seconds.

    ``from_files``: it is read from its files, and not copied from the host's memory.
    """

    model: str
    began: float
    from_files: bool = True


class EngineHandle:
    """The dispatcher's view of one engine.

    ``models`` and ``weights`` are those in its memory, by id. ``known``: models that it
    has described and has not in memory. ``leaving``: models that get no new jobs, because they make
    room for the model ``making_room_for``. ``loading``: what it loads now, and ``reading`` what
    it reads into the host's memory beside that. ``host``: the bytes of models that the host's
    memory keeps for it, at most ``host_budget``; ``host_free_bytes``: what was free there when it
    started, None if that is the device's own memory. ``files_only``: models that the host's memory
    could not take, so that they are loaded from their files at once. ``shared``: of each
    model that it has or had, the bytes of components that others may hold too.
    ``jobs``: those that the engine has, by id, whether or not a caller still wants them.
    ``memory``: its last report. ``adapters``: the bytes of those that it has in memory.
    ``batches``: the number that it ran; ``last_rows``: the rows of the last one.
    ``healthy_since_crash``: it finished a job since a death was last attributed to one.
    ``loaded``: it was ready once. ``retired``: it is never started again.
    ``starts_without_resources``: starts in a row that failed because the machine was exhausted.
    """

    def __init__(self, index: int, engine: Engine) -> None:
        self.index = index
        self.engine = engine
        self.ready = False
        self.loaded = False
        self.retired = False
        self.restarts = 0
        self.starts_without_resources = 0
        self.deaths: deque[Death] = deque()
        self.healthy_since_crash = True
        self.jobs: dict[str, ActiveJob] = {}
        self.models: dict[str, ModelInfo] = {}
        self.weights: dict[str, int] = {}
        self.known: dict[str, ModelInfo] = {}
        self.leaving: set[str] = set()
        self.making_room_for = ""
        self.loading: ModelLoading | None = None
        self.reading: ModelLoading | None = None
        self.files_only: set[str] = set()
        self.host: dict[str, int] = {}
        self.host_budget = 0
        self.host_free_bytes: int | None = None
        self.shared: dict[str, Mapping[str, int]] = {}
        self._capacity: float = math.inf
        self.batch_times = BatchTimeModel()
        self.memory: MemoryReport | None = None
        self.adapters: dict[AdapterKey, int] = {}
        self.batches = 0
        self.last_rows = 0
        self._row_limits: dict[Group, int] = {}
        self._cache = RemainingWorkCache()

    @property
    def samples(self) -> int:
        """Images in the engine."""
        return sum(active.job.image_count for active in self.jobs.values())

    @property
    def held_bytes(self) -> int:
        """Bytes that the unfinished images in the engine hold between their batches, at most."""
        return sum(self._bytes_of(active) for active in self.jobs.values())

    def has_room(self, max_samples: int, new: ActiveJob) -> bool:
        """Whether it takes ``new`` now: it has fewer than ``max_samples`` images, and its memory.

        A job that may have killed an engine is isolated: it shares its engine with no other job.
        One of another model than the jobs there may have to wait until they end, see ``admits``.
        """
        return self._fits(max_samples, new) and (not self.jobs or self.admits(new))

    def has_room_later(self, max_samples: int, new: ActiveJob) -> bool:
        """Whether ``new`` does not enter now only because jobs of other models run."""
        return self._fits(max_samples, new) and bool(self.jobs) and not self.admits(new)

    def free_rows(self) -> dict[Group, int]:
        """The rows that are free in the batches that run now, by their group."""
        rows: Counter[Group] = Counter()
        for work in self._cache.get(self.jobs.values()):
            rows[work.group] += len(work.calls) * work.key.rows
        return {group: self._max_rows(group) - count for group, count in rows.items() if count}

    def _fits(self, max_samples: int, new: ActiveJob) -> bool:
        if not self.holds(new.job.model) or self.samples >= max_samples:
            return False
        if not self.jobs:
            return True
        if any(active.crashes for active in self.jobs.values()):
            return False
        needed = self._bytes_of(new)
        held = self.held_bytes if needed else 0
        return not held or held + needed <= resident_bytes(self.models.values())

    def admits(self, new: ActiveJob) -> bool:
        """Whether ``new`` shares a model with a job here, or is more urgent than all of them.

        Models share no batches: if two take turns, both take longer, and the first one ends no
        sooner than alone. A short job still need not wait for a long one.
        """
        if any(active.job.model == new.job.model for active in self.jobs.values()):
            return True
        works = self._cache.get(self.jobs.values())
        work = remaining_work(new)
        goal = work.goal(sum(work.calls))
        return all(goal < each.goal(sum(each.calls)) for each in works)

    def holds(self, model: str) -> bool:
        """Whether jobs of ``model`` may enter: it is in memory, and does not make room."""
        return self.ready and model in self.models and model not in self.leaving

    def weight_budget(self, configured: int | None) -> float:
        """Bytes for the weights of its models: ``configured``, or what the largest batch leaves."""
        if configured is not None:
            return configured
        known = (*self.models.values(), *self.known.values())
        reserved = max(map(largest_batch_bytes, known), default=0)
        if not self.has_host_memory:
            reserved += self.host_budget
        return self._capacity - reserved

    def has_in_host(self, id: str) -> bool:
        """Whether the host's memory keeps a model; one that is being read is not there yet."""
        return id in self.host and (self.reading is None or self.reading.model != id)

    @property
    def in_progress(self) -> list[ModelLoading]:
        """What it loads, and what it reads into the host's memory."""
        return [each for each in (self.loading, self.reading) if each is not None]

    @property
    def has_host_memory(self) -> bool:
        """Whether the host's memory is another one than the device's."""
        return self.host_free_bytes is not None

    @property
    def bytes_by_tier(self) -> dict[str, int]:
        """The weights that it holds on the device and on the host, what models share once."""
        host = self.host
        if not self.has_host_memory:
            host = {id: size for id, size in host.items() if id not in self.weights}
        return {"device": self._bytes_of_all(self.weights), "host": self._bytes_of_all(host)}

    def load(self) -> Load:
        """Its state as the simulation takes it."""
        works = [work for work in self._cache.get(self.jobs.values()) if work.calls]
        return Load(
            batch_times=self.batch_times,
            max_rows=self._max_rows,
            jobs=works,
            resident_bytes=resident_bytes(self.models.values()),
        )

    def finish_seconds(self, new: RemainingWork) -> tuple[float, int]:
        """About when it would finish ``new``, and the denoiser calls of its jobs.

        For comparisons: if two finish it at the same time, the one that is empty sooner is better.
        """
        works = self._cache.get(self.jobs.values())
        seconds = finish_seconds(new, works, self.batch_times, self._max_rows)
        return seconds, sum(sum(work.calls) for work in works)

    def drain_seconds(self) -> dict[str, float]:
        """Seconds until the jobs of each model have ended if no others follow.

        Models share the time equally, until the jobs of one have ended. Those that were never
        measured take no time.
        """
        alone: defaultdict[str, float] = defaultdict(float)
        rows: Counter[Group] = Counter()
        calls: Counter[Group] = Counter()
        longest: Counter[Group] = Counter()
        for work in self._cache.get(self.jobs.values()):
            group = work.group
            rows[group] += len(work.calls) * work.key.rows
            calls[group] += sum(work.calls) * work.key.rows
            longest[group] = max(longest[group], *work.calls, 0)
        for group, count in rows.items():
            if self.batch_times.knows(group.model):
                most = min(count, self._max_rows(group))
                batches = max(longest[group], calls[group] / max(1, most))
                alone[group.model] += batches * self.batch_times.batch_seconds(group, most)
        return {
            model: sum(min(seconds, other) for other in alone.values())
            for model, seconds in alone.items()
        }

    # Jobs.

    def submit(self, active: ActiveJob) -> None:
        """Give the engine a job, without the images that an earlier run finished."""
        active.engine = self
        self.jobs[active.job.id] = active
        self.engine.submit(active.remaining_job())

    def cancel(self, active: ActiveJob) -> None:
        """Have the engine remove a job at the next step boundary."""
        self.engine.cancel(active.job.id)

    def extend(self, active: ActiveJob) -> None:
        """Send the engine the job's new deadline."""
        self.engine.extend(active.job.id, active.job.deadline)

    def remove(self, active: ActiveJob) -> None:
        """The engine no longer has the job."""
        del self.jobs[active.job.id]
        active.engine = None

    # What the engine reports.

    def set_ready(self, ready: EngineReady) -> None:
        """It has loaded its models."""
        self.ready = self.loaded = True
        self.starts_without_resources = 0
        self.models = {model.id: model for model in ready.models}
        self.weights = {load.model: load.weight_bytes for load in ready.loads}
        self.shared = {load.model: load.shared for load in ready.loads}
        self.host, self.host_free_bytes = {}, ready.host_free_bytes
        self.known = {each.id: each.info for each in ready.descriptions if each.info is not None}
        self.leaving, self.making_room_for = set(), ""
        self.loading = self.reading = None
        self.files_only = set()
        if ready.free_bytes is not None:
            self._capacity = ready.free_bytes + self._bytes_of_all(self.weights)
        self._row_limits.clear()
        for model in (*ready.models, *self.known.values()):
            self.batch_times.start(model)

    def describe(self, model: ModelInfo) -> None:
        """It has described a model of the catalogue, which is not in its memory."""
        self.known[model.id] = model
        self.batch_times.start(model)

    def add_model(self, model: ModelInfo, load: ModelLoad, free_bytes: int | None) -> None:
        """It has loaded a model."""
        self.loading = None
        self.files_only.discard(model.id)
        self.models[model.id] = model
        self.weights[model.id] = load.weight_bytes
        self.shared[model.id] = load.shared
        self.host.pop(model.id, None)
        if load.host_bytes:
            self.host[model.id] = load.host_bytes
        self.known.pop(model.id, None)
        self.share_memory(free_bytes)
        self._row_limits.clear()
        self.batch_times.start(model)

    def add_to_host(self, load: ModelLoad) -> None:
        """It has read a model into the host's memory, or could not."""
        self.reading = None
        self.shared[load.model] = load.shared
        if load.host_bytes:
            self.host[load.model] = load.host_bytes
        else:
            self.host.pop(load.model, None)
            self.files_only.add(load.model)

    def remove_model(self, id: str, *, keep: bool = False) -> None:
        """Have the engine free the memory of a model, which gets no more jobs.

        ``keep``: the host's memory keeps its weights.
        """
        self.known[id] = self.models.pop(id)
        self.weights.pop(id, None)
        self.leaving.discard(id)
        if not keep:
            self.host.pop(id, None)
        self.engine.unload_model(id, keep=keep)

    def drop_from_host(self, id: str) -> None:
        """Have the engine free a model's weights in the host's memory."""
        del self.host[id]
        self.engine.unload_model(id)

    def record_unloaded(self, event: ModelUnloaded) -> None:
        """It has freed the memory of a model, and the host keeps what it says."""
        self.share_memory(event.free_bytes)
        if not event.host_bytes:
            self.host.pop(event.model, None)
        elif event.model in self.host:
            self.host[event.model] = event.host_bytes

    def share_memory(self, free_bytes: int | None) -> None:
        """Its models have ``free_bytes`` for their batches now; None: not known."""
        self.models = {id: sharing(info, free_bytes) for id, info in self.models.items()}

    def set_dead(self) -> list[ActiveJob]:
        """It died; returns the jobs that were in it."""
        self.ready = False
        jobs, self.jobs = list(self.jobs.values()), {}
        for active in jobs:
            active.engine = None
        self._row_limits.clear()  # A new engine starts with its own.
        return jobs

    def record_batch(self, batch: BatchDone) -> None:
        """Learn from a batch."""
        self.batches += 1
        self.last_rows = batch.rows
        self.batch_times.record_batch(batch)
        group = Group(batch.model, batch.width, batch.height)
        if batch.max_rows:
            self._row_limits[group] = batch.max_rows
        for active in self.jobs.values():
            # Prompts are encoded between batches: those of every job here are done.
            if active.state is JobState.ENCODING:
                active.state = JobState.ENCODED

    def correct(self, correction: Correction) -> None:
        """The engine has corrected what was measured of a model."""
        if (model := self.models.get(correction.model)) is not None:
            self.models[correction.model] = correction.of(model)

    def shared_of(self, id: str) -> Shared:
        """The bytes of a model in memory that others may hold too, by their keys."""
        return self.shared.get(id, NOTHING)

    def _bytes_of_all(self, sizes: Mapping[str, int]) -> int:
        """The bytes of models, of which what they share counts once."""
        return held_bytes((size, self.shared_of(id)) for id, size in sizes.items())

    def _bytes_of(self, active: ActiveJob) -> int:
        model = self.models.get(active.job.model, active.model)
        return (active.job.image_count - len(active.images)) * model.held_bytes(active.job)

    def _max_rows(self, group: Group) -> int:
        """The most rows of a batch of ``group``: as its last one was limited, or as measured."""
        limit = self._row_limits.get(group)
        if limit is None:
            model = self.models.get(group.model) or self.known.get(group.model)
            limit = 2 if model is None else model.rows_of_a_pass(group.width, group.height)
            self._row_limits[group] = limit
        return limit
