"""How long passes and images take: started by what warm-up measured, learned from each one."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from darkroom_server.core.events import BatchDone, DecodeDone, StageSeconds
from darkroom_server.core.job import Job
from darkroom_server.core.model import ModelInfo

GUESS_SECONDS = 0.1
"""A row of a pass of an engine of which nothing is known: only good for comparing jobs."""

LEARNING = 0.05
"""What a pass changes of what is expected of its group, and as much of what is expected of all, as
a part of its own difference: the last dozen of passes decide."""

POINT_LEARNING = 0.02
"""The same for what is expected of its rows, beside others: that is the device's nature, and slow
to change."""

LARGEST_SURPRISE = 1.0
"""In natural logarithms: one slow pass (the first of its shape, say) is not believed more."""

SHORTEST_SECONDS, LONGEST_SECONDS = 1e-6, 1e5
"""What is not between them is no time that something took."""

MAX_GROUPS = 64
"""Sizes remembered; the one used longest ago is forgotten, so that no caller makes memory grow."""


class Group(NamedTuple):
    """Images of one model and size, in pixels: they can share a pass."""

    model: str
    width: int
    height: int

    @property
    def pixels(self) -> int:
        """Of one image."""
        return self.width * self.height

    @classmethod
    def of(cls, job: Job) -> "Group":
        """The group of a job's images."""
        return cls(job.model, job.width, job.height)


class BatchTimeCurve:
    """Seconds of a pass over its rows, for one group: a line through what was met, and beyond.

    ``points`` are rows and seconds, not empty, and believed to be right beside each other. Where
    they were not ``measured``, the first few passes say how slow the whole is.
    """

    def __init__(self, points: dict[int, float], *, measured: bool) -> None:
        self.points = dict(sorted(points.items()))
        self.level = 0.0
        self._met = 1000 if measured else 0
        self._given = frozenset(points)
        self._points_met = dict.fromkeys(points, self._met)

    @property
    def met(self) -> list[int]:
        """The row counts of which a pass was seen, or measured at warm-up."""
        return [rows for rows, count in self._points_met.items() if count]

    def at(self, rows: float) -> float:
        """Seconds of a pass of ``rows``: on the line between neighbours, or prolonging the last.

        Prolonged no flatter than level, and no steeper than in proportion.
        """
        points = list(self.points.items())
        if len(points) == 1:
            (known, seconds) = points[0]
            # The half of it is there for one row as for many: so it is on the devices we measured.
            return seconds * (0.5 + 0.5 * rows / known) * math.exp(self.level)
        at = next((i for i, (r, _) in enumerate(points) if r >= rows), len(points) - 1)
        (low, below), (high, above) = points[max(1, at) - 1], points[max(1, at)]
        seconds = below + (above - below) * (rows - low) / (high - low)
        if rows < low:
            seconds = min(max(seconds, below * rows / low), below)
        elif rows > high:
            seconds = min(max(seconds, above), above * rows / high)
        return seconds * math.exp(self.level)

    def learn(self, rows: int, surprise: float) -> None:
        """Move the point of ``rows``, and the whole, by their parts of ``surprise``."""
        if rows not in self.points:
            self.points[rows] = self.at(rows) / math.exp(self.level)
            self.points = dict(sorted(self.points.items()))
            self._points_met[rows] = 0
        self._met += 1
        self._points_met[rows] += 1
        first = 0.0 if rows in self._given else 1 / (self._points_met[rows] + 1)
        part = max(POINT_LEARNING, first)
        self.points[rows] *= math.exp(surprise * part)
        self.level += surprise * max(LEARNING, 1 / (self._met + 1))


class BatchTimeModel:
    """What one engine is expected to take, in seconds; always finite and above zero.

    A pass's time is the product of what its rows take in its group, of how slow that group is, and
    of how slow the machine is just now: a machine that slows down does so for all rows and sizes,
    most of which were not met lately.
    """

    def __init__(self) -> None:
        self._curves: dict[Group, BatchTimeCurve] = {}
        self._level = 0.0
        self._decode: dict[str, float] = {}
        self._encode: dict[str, float] = {}
        self._prompt: dict[str, float] = {}

    def start(self, model: ModelInfo) -> None:
        """Begin with what warm-up measured, where nothing is known of ``model`` yet."""
        group = Group(model.id, model.defaults.width, model.defaults.height)
        points = {rows: s for rows, s in model.speed.passes if _is_time(s)}
        if points and not self.knows(model.id):
            self._curves[group] = BatchTimeCurve(points, measured=True)
            self._level = 0.0
        if _is_time(model.speed.decode):
            self._decode.setdefault(model.id, model.speed.decode / group.pixels)

    def knows(self, model_id: str) -> bool:
        """Whether anything was measured of this model."""
        return any(group.model == model_id for group in self._curves)

    def pass_seconds(self, group: Group, rows: float) -> float:
        """One pass of so many rows."""
        if group in self._curves:
            known, equal_rows = group, rows
        elif (nearest := self._nearest(group)) is not None:
            # A row of twice the pixels takes what two rows do.
            known, equal_rows = nearest, rows * group.pixels / nearest.pixels
        else:
            return GUESS_SECONDS * rows
        seconds = self._curves[known].at(equal_rows) * math.exp(self._level)
        return min(max(seconds, SHORTEST_SECONDS), LONGEST_SECONDS)

    def decode_seconds(self, group: Group) -> float:
        """From latents to the pixels of one image; no pass runs meanwhile."""
        return self._decode.get(group.model, 0.0) * group.pixels

    def encode_seconds(self, group: Group) -> float:
        """From pixels to an encoded image; passes go on meanwhile."""
        return self._encode.get(group.model, 0.0) * group.pixels

    def prompt_seconds(self, group: Group) -> float:
        """Turning a job's prompts into embeddings; no pass runs meanwhile."""
        return self._prompt.get(group.model, 0.0)

    def passed(self, event: BatchDone) -> None:
        """Learn from a pass."""
        if not _is_time(event.seconds):
            return
        group = Group(event.model, event.width, event.height)
        curve = self._curves.pop(group, None)
        if curve is None:
            known = self._nearest(group)
            if known is None:
                first = event.seconds / math.exp(self._level)
                curve = BatchTimeCurve({event.rows: first}, measured=False)
            else:
                ratio = group.pixels / known.pixels
                rows = {event.rows, *self._curves[known].points}
                points = {r: self._curves[known].at(r * ratio) for r in rows}
                curve = BatchTimeCurve(points, measured=False)
        expected = max(curve.at(event.rows) * math.exp(self._level), SHORTEST_SECONDS)
        surprise = math.log(event.seconds / expected)
        surprise = min(max(surprise, -LARGEST_SURPRISE), LARGEST_SURPRISE)
        curve.learn(event.rows, surprise)
        self._level += LEARNING * surprise
        self._curves[group] = curve  # The last to be forgotten.
        if len(self._curves) > MAX_GROUPS:
            del self._curves[next(iter(self._curves))]

    def decoded(self, event: DecodeDone) -> None:
        """Learn from a decode."""
        _blend(self._decode, event.model, event.seconds / (event.width * event.height))

    def finished(self, job: Job, stages: StageSeconds) -> None:
        """Learn from a finished job."""
        _blend(self._encode, job.model, stages.encode_image / (job.width * job.height))
        _blend(self._prompt, job.model, stages.encode_prompt)

    def measured(self) -> Iterator[tuple[Group, int, float]]:
        """Every group and row count met, with the seconds that a pass is expected to take now."""
        for group, curve in self._curves.items():
            for rows in curve.met:
                yield group, rows, self.pass_seconds(group, rows)

    def _nearest(self, group: Group) -> Group | None:
        """The known group of the same model whose size is the most alike."""
        known = [each for each in self._curves if each.model == group.model]
        return min(known, key=lambda each: abs(math.log(each.pixels / group.pixels)), default=None)


def _is_time(seconds: float) -> bool:
    return SHORTEST_SECONDS <= seconds <= LONGEST_SECONDS


def _blend(known: dict[str, float], key: str, seconds: float) -> None:
    """Move a mean towards ``seconds``, of which a single one is not believed too much."""
    if not 0.0 < seconds < LONGEST_SECONDS:
        return
    mean = known.setdefault(key, seconds)
    known[key] = mean + 0.1 * (min(seconds, 4 * mean) - mean)
