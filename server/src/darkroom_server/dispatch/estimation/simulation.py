"""A simulation of the queue and the batches: when jobs will start and finish.

It is deterministic and runs over plain keys. It follows the engine: the most urgent rows share the
batches of their group, groups take turns, finished images are decoded between batches, and waiting
jobs enter when there is room. It is cheap because the rows of a batch only change when an image
finishes: it advances from one finished image to the next, not from batch to batch.
"""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from darkroom_server.core.order import turns_for
from darkroom_server.dispatch.estimation.batch_times import BatchTimeModel, Group
from darkroom_server.dispatch.estimation.model_turns import GroupQueue, ModelTurns
from darkroom_server.dispatch.estimation.remaining_work import RemainingWork

MAX_IMAGES = 400
"""Finished images that are simulated, in under a millisecond; later ones are extrapolated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One engine: its batch times, the most rows of a batch of a group, and the jobs in it.

    ``resident_bytes``: what its unfinished images may hold.
    """

    batch_times: BatchTimeModel
    max_rows: Callable[[Group], int]
    jobs: Sequence[RemainingWork]
    resident_bytes: float = math.inf


@dataclass(slots=True)
class Forecast:
    """Seconds from now by job id; ``joins``: when waiting jobs enter an engine."""

    starts: dict[str, float] = field(default_factory=dict)
    finishes: dict[str, float] = field(default_factory=dict)
    joins: dict[str, float] = field(default_factory=dict)


def simulate_queue(
    loads: Sequence[Load],
    waiting: Iterable[RemainingWork],
    max_samples: int,
    *,
    arrivals: Iterable[RemainingWork] = (),
    max_images: float = MAX_IMAGES,
) -> Forecast:
    """Simulate the engines of ``loads``, at least one, with their jobs and those that wait.

    ``waiting`` is in its order; a job enters while an engine has fewer than ``max_samples`` images
    and the memory. Jobs of ``arrivals`` are submitted later, at their ``key.submitted_at`` in
    seconds from the start.
    """
    forecast = Forecast()
    engines = [SimulatedEngine(load, forecast) for load in loads]
    queue = list(waiting)[::-1]
    _admit(queue, engines, max_samples, 0.0, forecast)
    for engine in engines:
        engine.fill()
    later = sorted(arrivals, key=lambda work: work.key.submitted_at, reverse=True)
    images = 0
    while images < max_images:
        busy = [engine for engine in engines if engine.busy]
        if not busy and not later:
            break
        if later and later[-1].key.submitted_at < min(
            map(SimulatedEngine.next_at, busy), default=math.inf
        ):
            arrival = later[-1].key.submitted_at
            while later and later[-1].key.submitted_at == arrival:
                queue.append(later.pop())
            queue.sort(key=lambda work: work.goal(sum(work.calls)), reverse=True)
            for engine in engines:
                engine.advance_to(arrival)
            _admit(queue, engines, max_samples, arrival, forecast)
            for engine in engines:
                engine.choose_again()
            continue
        images += 1
        engine = min(busy, key=SimulatedEngine.next_at) if len(busy) > 1 else busy[0]
        engine.advance()
        _admit(queue, engines, max_samples, engine.now, forecast)
        engine.fill()
    _extrapolate(queue, engines, forecast)
    return forecast


def _admit(
    queue: list[RemainingWork],
    engines: list["SimulatedEngine"],
    max_samples: int,
    now: float,
    forecast: Forecast,
) -> None:
    while queue:
        able = [engine for engine in engines if engine.has_room(queue[-1], max_samples)]
        if not able:
            return
        engine = min(able, key=SimulatedEngine.work_seconds) if len(able) > 1 else able[0]
        work = queue.pop()
        engine.now = max(engine.now, now)
        forecast.joins[work.id] = engine.now
        engine.take(work)


def _extrapolate(
    queue: list[RemainingWork], engines: list["SimulatedEngine"], forecast: Forecast
) -> None:
    """The rest follows at the pace of full batches."""
    for engine in engines:
        for work in engine.unfinished():
            engine.skip(work)
            forecast.finishes[work.id] = engine.now
    for work in reversed(queue):
        engine = min(engines, key=lambda each: each.now)
        forecast.joins[work.id] = forecast.starts[work.id] = engine.now
        engine.skip_new(work)
        forecast.finishes[work.id] = engine.now


class SimulatedEngine:
    """One engine in the simulation; ``now`` is in seconds from the start.

    The models with a batch each get the same seconds, which their groups share.
    """

    def __init__(self, load: Load, forecast: Forecast) -> None:
        self.now = 0.0
        self.samples = 0
        self._held_bytes = 0
        self._resident_bytes = load.resident_bytes
        self._batch_times = load.batch_times
        self._max_rows = load.max_rows
        self._forecast = forecast
        self._queues: dict[Group, GroupQueue] = {}
        self._unfinished: dict[str, int] = {}
        self._jobs: dict[str, RemainingWork] = {}
        self._full: dict[str, float] = {}
        self._seconds: dict[tuple[Group, int, bool], float] = {}
        self._count = 0
        self._work_seconds = 0.0
        self._turns: dict[str, ModelTurns] = {}
        self._active: dict[str, ModelTurns] = {}
        self._to_fill: dict[Group, GroupQueue] = {}
        for work in load.jobs:
            self._add(work)
        encode = sum(map(self._prompt_seconds, load.jobs))
        if self._queues:
            # The next step boundary is half a batch away, on average.
            seconds = [self._full_batch_seconds(group) for group in self._queues.values()]
            self.now = sum(seconds) / len(seconds) / 2 + encode

    @property
    def busy(self) -> bool:
        """Whether it has images."""
        return bool(self._active or self._to_fill)

    def next_at(self) -> float:
        """When the next image is finished."""
        if not self._active:
            return self.now
        return self.now + len(self._active) * self._next_model().service()

    def has_room(self, work: RemainingWork, max_samples: int) -> bool:
        """Whether it takes ``work`` now: by its images, and by what they hold in memory.

        One of another model must be more urgent than all that are there; see ``EngineHandle``.
        """
        if self.samples >= max_samples or not self._admits(work):
            return False
        needed = len(work.calls) * work.bytes_per_image
        held = self._held_bytes
        return not (needed and held) or held + needed <= self._resident_bytes

    def _admits(self, work: RemainingWork) -> bool:
        if not self._unfinished or work.group.model in self._active:
            return True
        calls: Counter[str] = Counter()
        for each, remaining in self.remaining():
            if each.group.model == work.group.model:
                return True
            calls[each.id] += remaining
        goal = work.goal(sum(work.calls))
        return all(goal < self._jobs[id].goal(count) for id, count in calls.items())

    def take(self, work: RemainingWork) -> None:
        """Add a job."""
        self.now += self._prompt_seconds(work)
        self._add(work)

    def fill(self) -> None:
        """Add the most urgent samples to the batches of their group."""
        for group in self._to_fill.values():
            self._fill(group)
        self._to_fill.clear()

    def advance(self) -> None:
        """Advance to the next finished image, and finish all that end with it."""
        if not self._active:
            return
        model = self._next_model()
        self._serve(model.service())
        model.virtual = model.next_at()
        while model.active and model.next_at() <= model.virtual:
            _, _, group = heapq.heappop(model.agenda)
            self._settle(group)
            ended = []
            while group.running and group.running[0][0] <= group.batches + 1e-6:
                _, _, work = heapq.heappop(group.running)
                group.rows -= work.key.rows
                group.adapted -= work.adapted
                ended.append(work)
            self._plan(group)
            self._to_fill[group.group] = group
            for work in ended:
                self._finish(work)

    def advance_to(self, moment: float) -> None:
        """Advance to the first step boundary at or after ``moment``; no image finishes before."""
        if not self._active:
            self.now = max(self.now, moment)
            return
        service = max(0.0, moment - self.now) / len(self._active)
        if len(self._active) == 1:
            (model,) = self._active.values()
            if len(model.active) == 1:
                (group,) = model.active.values()
                seconds = self._running_seconds(group)
                service = math.ceil(service / seconds - 1e-6) * seconds
        self._serve(min(service, self._next_model().service()))

    def choose_again(self) -> None:
        """Choose the samples of the batches again: an urgent arrival displaces others."""
        for group in self._queues.values():
            self._settle(group)
            for end, count, work in group.running:
                calls = round(end - group.batches)
                urgency = work.goal(calls), work.key.submitted_at, work.id
                heapq.heappush(group.ready, (*urgency, count, calls, work))
            group.running, group.rows, group.adapted = [], 0, 0
            self._plan(group)
            self._to_fill[group.group] = group
        self.fill()

    def remaining(self) -> Iterator[tuple[RemainingWork, int]]:
        """The unfinished images, and the calls that remain of each."""
        for group in self._queues.values():
            self._settle(group)
            for end, _, work in group.running:
                yield work, round(end - group.batches)
            for *_, calls, work in group.ready:
                yield work, calls

    def work_seconds(self) -> float:
        """Seconds of the work that remains in it, at the pace of full batches."""
        return self._work_seconds

    def unfinished(self) -> list[RemainingWork]:
        """The jobs that have images to finish."""
        return [self._jobs[id] for id in self._unfinished]

    def skip(self, work: RemainingWork) -> None:
        """Advance by the time of a whole job."""
        self._forecast.starts.setdefault(work.id, self.now)
        self.now += self._full_seconds(work)

    def skip_new(self, work: RemainingWork) -> None:
        """Advance by the time of a job that never entered."""
        self.now += self._prompt_seconds(work)
        self.skip(work)

    def _prompt_seconds(self, work: RemainingWork) -> float:
        return 0.0 if work.encoded else self._batch_times.prompt_seconds(work.group)

    def _next_model(self) -> ModelTurns:
        """The active model whose next image finishes first."""
        if len(self._active) == 1:
            return next(iter(self._active.values()))
        return min(self._active.values(), key=ModelTurns.service)

    def _serve(self, service: float) -> None:
        """Run batches of each active model for ``service`` seconds."""
        self.now += service * len(self._active)
        for model in self._active.values():
            model.virtual += service / model.round_seconds

    def _settle(self, group: GroupQueue) -> None:
        """Count the batches that a group has run until now; before its rows change."""
        virtual = self._turns[group.group.model].virtual
        group.batches += (virtual - group.served_at) * group.turns
        group.served_at = virtual

    def _plan(self, group: GroupQueue) -> None:
        """Note when a settled group finishes its next image; after its rows changed."""
        self._count += 1
        group.plan = self._count
        model = self._turns[group.group.model]
        model.remove(group)
        if not group.running:
            if not model.active:
                self._active.pop(group.group.model, None)
            return
        self._active[group.group.model] = model
        longest = max(work.key.remaining_steps for _, _, work in group.running)
        model.add(group, turns_for(longest), self._running_seconds(group))

    def _add(self, work: RemainingWork) -> None:
        group = self._queues.get(work.group)
        if group is None:
            group = GroupQueue(work.group, self._max_rows(work.group))
            self._queues[work.group] = group
            self._turns.setdefault(work.group.model, ModelTurns())
        self._to_fill[work.group] = group
        self._jobs[work.id] = work
        self._full[work.id] = full = self._full_seconds(work)
        self._work_seconds += full
        self._unfinished[work.id] = len(work.calls)
        self.samples += len(work.calls)
        self._held_bytes += len(work.calls) * work.bytes_per_image
        if work.begun:
            self._forecast.starts[work.id] = 0.0
        for calls in work.calls:
            self._count += 1
            urgency = work.goal(calls), work.key.submitted_at, work.id
            heapq.heappush(group.ready, (*urgency, self._count, calls, work))

    def _fill(self, group: GroupQueue) -> None:
        """Add the most urgent samples, as many as fit."""
        self._settle(group)
        while group.ready:
            *_, count, calls, work = group.ready[0]
            rows = work.key.rows
            if group.running and group.rows + rows > group.max_rows and not work.key.alone:
                break
            heapq.heappop(group.ready)
            self._forecast.starts.setdefault(work.id, self.now)
            if work.key.alone:
                # It has the engine to itself from its first batch to its last.
                self.now += calls * self._batch_seconds(group.group, rows, adapted=work.adapted)
                self._finish(work)
                continue
            group.rows += rows
            group.adapted += work.adapted
            heapq.heappush(group.running, (group.batches + calls, count, work))
        self._plan(group)

    def _finish(self, work: RemainingWork) -> None:
        """Finish one image of a job."""
        self.now += self._batch_times.decode_seconds(work.group)
        self._unfinished[work.id] -= 1
        self._held_bytes -= work.bytes_per_image
        if not self._unfinished[work.id]:
            del self._unfinished[work.id]
            self._work_seconds -= self._full[work.id]
            self.samples -= len(work.calls)
            self._forecast.finishes[work.id] = self.now + self._batch_times.encode_seconds(
                work.group
            )

    def _full_batch_seconds(self, group: GroupQueue) -> float:
        """Seconds of a batch of the ready samples, as many as fit."""
        rows = sum(work.key.rows for *_, work in group.ready)
        adapted = any(work.adapted for *_, work in group.ready)
        return self._batch_seconds(group.group, min(rows, group.max_rows), adapted=adapted)

    def _running_seconds(self, group: GroupQueue) -> float:
        """Seconds of a batch of the running samples."""
        return self._batch_seconds(group.group, group.rows, adapted=group.adapted > 0)

    def _batch_seconds(self, group: Group, rows: int, *, adapted: bool) -> float:
        seconds = self._seconds.get((group, rows, adapted))
        if seconds is None:
            seconds = self._batch_times.batch_seconds(group, rows)
            if adapted:
                seconds *= self._batch_times.adapter_factor(group.model)
            self._seconds[group, rows, adapted] = seconds
        return seconds

    def _full_seconds(self, work: RemainingWork) -> float:
        full = max(work.key.rows, self._max_rows(work.group))
        per_row = self._batch_seconds(work.group, full, adapted=work.adapted) / full
        decode = len(work.calls) * self._batch_times.decode_seconds(work.group)
        return sum(work.calls) * work.key.rows * per_row + decode
