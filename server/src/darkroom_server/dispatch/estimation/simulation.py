"""When jobs will start and finish: a deterministic simulation over plain keys.

The engine's rhythm is taken as it is: the most urgent rows share the passes of their group, groups
take turns, finished images are decoded between passes, and waiting jobs come in as places become
free. What keeps it cheap is that who is in a pass only changes when an image is finished, so that
it goes from one finished image to the next, not from pass to pass.
"""

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from darkroom_server.dispatch.estimation.batch_times import BatchTimeModel, Group
from darkroom_server.dispatch.estimation.remaining_work import RemainingWork

MAX_IMAGES = 400
"""Finished images that are simulated, under a millisecond; what comes behind is extrapolated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One engine: how fast it is, the most rows of a pass of a group, and the jobs in it."""

    speed: BatchTimeModel
    max_rows: Callable[[Group], int]
    jobs: Sequence[RemainingWork]


@dataclass(slots=True)
class Forecast:
    """Seconds from now by job id; ``joins`` are when waiting jobs get a place in an engine."""

    starts: dict[str, float] = field(default_factory=dict)
    finishes: dict[str, float] = field(default_factory=dict)
    joins: dict[str, float] = field(default_factory=dict)


def forecast(loads: Sequence[Load], waiting: Iterable[RemainingWork], max_samples: int) -> Forecast:
    """Let the engines of ``loads``, at least one, draw what is in them and what waits.

    ``waiting`` comes in its order; one is let in while an engine holds fewer than ``max_samples``.
    """
    told = Forecast()
    engines = [_Engine(load, told) for load in loads]
    queue = list(waiting)[::-1]
    _let_in(queue, engines, max_samples, 0.0, told)
    for engine in engines:
        engine.fill()
    for _ in range(MAX_IMAGES):
        busy = [engine for engine in engines if engine.busy]
        if not busy:
            break
        engine = min(busy, key=_Engine.next_at) if len(busy) > 1 else busy[0]
        engine.advance()
        _let_in(queue, engines, max_samples, engine.now, told)
        engine.fill()
    _extrapolate(queue, engines, told)
    return told


def _let_in(
    queue: list[RemainingWork],
    engines: list["_Engine"],
    max_samples: int,
    now: float,
    told: Forecast,
) -> None:
    while queue:
        able = [engine for engine in engines if engine.samples < max_samples]
        if not able:
            return
        engine = min(able, key=_Engine.work_seconds) if len(able) > 1 else able[0]
        work = queue.pop()
        engine.now = max(engine.now, now)
        told.joins[work.id] = engine.now
        engine.take(work)


def _extrapolate(queue: list[RemainingWork], engines: list["_Engine"], told: Forecast) -> None:
    """What is left takes its turn at the pace of full passes."""
    for engine in engines:
        for work in engine.unfinished():
            engine.skip(work)
            told.finishes[work.id] = engine.now
    for work in reversed(queue):
        engine = min(engines, key=lambda each: each.now)
        told.joins[work.id] = told.starts[work.id] = engine.now
        engine.skip(work)
        told.finishes[work.id] = engine.now


@dataclass(slots=True)
class _Lines:
    """The samples of one group: those in its passes, and those that would be."""

    group: Group
    max_rows: int
    passes: float = 0.0
    rows: int = 0
    running: list[tuple[float, int, RemainingWork]] = field(default_factory=list)
    ready: list[tuple[float, float, str, int, int, RemainingWork]] = field(default_factory=list)


class _Engine:
    """One engine in the simulation; ``now`` is in seconds from the beginning."""

    def __init__(self, load: Load, told: Forecast) -> None:
        self.now = 0.0
        self.samples = 0
        self._speed = load.speed
        self._max_rows = load.max_rows
        self._told = told
        self._lines: dict[Group, _Lines] = {}
        self._left: dict[str, int] = {}
        self._jobs: dict[str, RemainingWork] = {}
        self._seconds: dict[tuple[Group, int], float] = {}
        self._count = 0
        for work in load.jobs:
            self._add(work)
        if self._lines:
            # The next boundary is half a pass away, on average.
            passes = [self._full_pass_seconds(lines) for lines in self._lines.values()]
            self.now = sum(passes) / len(passes) / 2

    @property
    def busy(self) -> bool:
        return any(lines.running or lines.ready for lines in self._lines.values())

    def next_at(self) -> float:
        """When the next image is finished."""
        active = self._active()
        if not active:
            return self.now
        return self.now + len(active) * min(self._service(lines) for lines in active)

    def take(self, work: RemainingWork) -> None:
        """Let a job in."""
        self.now += 0.0 if work.begun else self._speed.prompt_seconds(work.group)
        self._add(work)

    def fill(self) -> None:
        """Let the most urgent samples into the passes of their group."""
        for lines in self._lines.values():
            self._fill(lines)

    def advance(self) -> None:
        """Go on to the next finished image; those that finish with it do so too."""
        active = self._active()
        if not active:
            return
        service = min(self._service(lines) for lines in active)
        self.now += service * len(active)
        for lines in active:
            lines.passes += service / self._pass_seconds(lines.group, lines.rows)
            while lines.running and lines.running[0][0] <= lines.passes + 1e-6:
                _, _, work = heapq.heappop(lines.running)
                lines.rows -= work.key.rows
                self._finish(work)

    def work_seconds(self) -> float:
        """What is left in it, at the pace of full passes."""
        return sum(self._full_seconds(self._jobs[id]) for id in self._left)

    def unfinished(self) -> list[RemainingWork]:
        return [self._jobs[id] for id in self._left]

    def skip(self, work: RemainingWork) -> None:
        """Let the time of a whole job pass."""
        self._told.starts.setdefault(work.id, self.now)
        self.now += self._full_seconds(work)

    def _active(self) -> list[_Lines]:
        return [lines for lines in self._lines.values() if lines.running]

    def _add(self, work: RemainingWork) -> None:
        lines = self._lines.get(work.group)
        if lines is None:
            lines = _Lines(work.group, self._max_rows(work.group))
            self._lines[work.group] = lines
        self._jobs[work.id] = work
        self._left[work.id] = len(work.passes)
        self.samples += len(work.passes)
        if work.begun:
            self._told.starts[work.id] = 0.0
        for passes in work.passes:
            self._count += 1
            urgency = work.goal(passes), work.key.submitted_at, work.id
            heapq.heappush(lines.ready, (*urgency, self._count, passes, work))

    def _fill(self, lines: _Lines) -> None:
        """Let the most urgent samples into the passes, as many as fit."""
        while lines.ready:
            *_, count, passes, work = lines.ready[0]
            rows = work.key.rows
            if lines.running and lines.rows + rows > lines.max_rows and not work.key.alone:
                return
            heapq.heappop(lines.ready)
            self._told.starts.setdefault(work.id, self.now)
            if work.key.alone:
                # It has the engine to itself from its first pass to its last.
                self.now += passes * self._pass_seconds(lines.group, rows)
                self._finish(work)
                continue
            lines.rows += rows
            heapq.heappush(lines.running, (lines.passes + passes, count, work))

    def _finish(self, work: RemainingWork) -> None:
        """One image of a job is done."""
        self.now += self._speed.decode_seconds(work.group)
        self._left[work.id] -= 1
        if not self._left[work.id]:
            del self._left[work.id]
            self.samples -= len(work.passes)
            self._told.finishes[work.id] = self.now + self._speed.encode_seconds(work.group)

    def _full_pass_seconds(self, lines: _Lines) -> float:
        """A pass of all that are ready, as many as fit."""
        rows = sum(work.key.rows for *_, work in lines.ready)
        return self._pass_seconds(lines.group, min(rows, lines.max_rows))

    def _service(self, lines: _Lines) -> float:
        """Seconds of passes until the first of a group is finished."""
        left = max(0.0, lines.running[0][0] - lines.passes)
        return left * self._pass_seconds(lines.group, lines.rows)

    def _pass_seconds(self, group: Group, rows: int) -> float:
        seconds = self._seconds.get((group, rows))
        if seconds is None:
            seconds = self._seconds[group, rows] = self._speed.pass_seconds(group, rows)
        return seconds

    def _full_seconds(self, work: RemainingWork) -> float:
        full = max(work.key.rows, self._max_rows(work.group))
        a_row = self._pass_seconds(work.group, full) / full
        decode = len(work.passes) * self._speed.decode_seconds(work.group)
        return sum(work.passes) * work.key.rows * a_row + decode
