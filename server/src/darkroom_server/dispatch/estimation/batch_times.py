"""How long batches and images take: measured at warm-up, then learned from every batch."""

import math
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from darkroom_server.core.events import BatchDone, DecodeDone, EncodeDone, StageSeconds
from darkroom_server.core.job import Job
from darkroom_server.core.model import ModelInfo
from darkroom_server.dispatch.estimation.calibration import OPTIMISTIC, quantile

GUESS_SECONDS = 0.1
"""Seconds for each row of an engine that was never measured: only good for comparing jobs."""

LEARNING = 0.05
"""EWMA weight of one batch, for the level of its group and for the level of the engine."""

POINT_LEARNING = 0.02
"""EWMA weight of one batch for its row count, relative to others: a slow property of the device."""

SHAPE_LEARNING, SHAPE_BATCHES = 0.3, 30
"""EWMA weight of a row count's first batches, and their number, if the measured point is wrong:
other row counts have set the level, and this one is off by more than ``WRONG_POINT``."""

WRONG_POINT = math.log(1.5)

LARGEST_ADAPTER_COST = math.log(4.0)
"""Batches with LoRA adapters take at most that multiple of those without: four times as long."""

LARGEST_SURPRISE = 1.0
"""In natural logarithms: limits the effect of one slow batch, such as the first of its shape."""

SHORTEST_SECONDS, LONGEST_SECONDS = 1e-6, 1e5
"""Times outside this range are ignored."""

BLOCK = 16
"""Batches whose mean is one observation of the level: a job meets the mean of many batches."""

RECENT = 64
"""Blocks of a group that its optimistic level is taken from: more than one slow stretch."""

MAX_GROUPS = 64
"""Sizes kept, least recently used removed first: callers must not make memory grow."""

MAX_NEAREST = 1024
"""Sizes whose nearest known size is remembered."""


class Group(NamedTuple):
    """Images of one model and size, in pixels: they can share a batch.

    The size is a job's ``denoised_size``.
    """

    model: str
    width: int
    height: int

    @property
    def pixels(self) -> int:
        """Pixels of one image."""
        return self.width * self.height

    @classmethod
    def of(cls, job: Job) -> "Group":
        """The group of a job's images."""
        return cls(job.model, *job.denoised_size)


class BatchTimeCurve:
    """Seconds of a batch over its rows, for one group: piecewise linear, and extrapolated.

    ``points``: seconds by rows, not empty; their ratios are trusted until real batches contradict
    them. If they were not ``measured``, the first batches set the level.
    """

    def __init__(self, points: dict[int, float], *, measured: bool) -> None:
        self.points = dict(sorted(points.items()))
        self.level = 0.0
        # Enough observations of the measured level to be the optimistic share of a full window.
        known = int(RECENT * OPTIMISTIC) + 1 if measured else 0
        self._recent: deque[float] = deque([0.0] * known, maxlen=RECENT)
        self._block: list[float] = []
        self._met = 1000 if measured else 0
        self._given = frozenset(points)
        self._points_met = dict.fromkeys(points, self._met)
        self._real: dict[int, int] = {}

    @property
    def met(self) -> list[int]:
        """The row counts that were seen in a batch or measured at warm-up."""
        return [rows for rows, count in self._points_met.items() if count]

    def at(self, rows: float) -> float:
        """Seconds of a batch of ``rows``: interpolated, or extrapolated from the last two points.

        The extrapolation is at least constant and at most proportional.
        """
        points = list(self.points.items())
        if len(points) == 1:
            (known, seconds) = points[0]
            # Assume half of a batch is fixed cost (measured).
            return seconds * (0.5 + 0.5 * rows / known) * math.exp(self.level)
        at = next((i for i, (r, _) in enumerate(points) if r >= rows), len(points) - 1)
        (low, below), (high, above) = points[max(1, at) - 1], points[max(1, at)]
        seconds = below + (above - below) * (rows - low) / (high - low)
        if rows < low:
            seconds = min(max(seconds, below * rows / low), below)
        elif rows > high:
            seconds = min(max(seconds, above), above * rows / high)
        return seconds * math.exp(self.level)

    def optimistic_level(self) -> float:
        """The level of the blocks that were fast recently; infinite if there was none."""
        return quantile(self._recent, OPTIMISTIC) if self._recent else math.inf

    def learn(self, rows: int, surprise: float, level: float) -> None:
        """Move the point of ``rows``, and the level, by their shares of ``surprise``.

        ``level``: that of this batch alone, the level of the engine included.
        """
        self._block.append(level)
        if len(self._block) == BLOCK:
            self._recent.append(sum(self._block) / BLOCK)
            self._block.clear()
        if rows not in self.points:
            self.points[rows] = self.at(rows) / math.exp(self.level)
            self.points = dict(sorted(self.points.items()))
            self._points_met[rows] = 0
        self._met += 1
        self._points_met[rows] += 1
        part = max(POINT_LEARNING, self._first_part(rows, surprise))
        self.points[rows] *= math.exp(surprise * part)
        self.level += surprise * max(LEARNING, 1 / (self._met + 1))

    def _first_part(self, rows: int, surprise: float) -> float:
        """The weight of one of the first batches of ``rows`` for its point."""
        real = self._real[rows] = self._real.get(rows, 0) + 1
        if rows not in self._given:
            return 1 / (self._points_met[rows] + 1)
        wrong = len(self._real) > 1 and abs(surprise) > WRONG_POINT and real <= SHAPE_BATCHES
        return SHAPE_LEARNING if wrong else 0.0


class BatchTimeModel:
    """Expected seconds of one engine's work; always finite and above zero.

    The time of a batch is a product: the curve of its group over rows, the level of that group, and
    the level of the engine. A machine that slows down does so for all rows and sizes, most of which
    were not seen recently.
    """

    def __init__(self) -> None:
        self._curves: dict[Group, BatchTimeCurve] = {}
        self._nearest_known: dict[Group, Group | None] = {}
        self._level = 0.0
        # The logarithm of the factor by model, and the batches that it was learned from.
        self._adapter_cost: dict[str, tuple[float, int]] = {}
        self._decode: dict[str, float] = {}
        self._encode: dict[str, float] = {}
        self._prompt: dict[str, float] = {}

    def start(self, model: ModelInfo) -> None:
        """Start with what warm-up measured, if ``model`` is not known yet."""
        group = Group(model.id, model.defaults.width, model.defaults.height)
        points = {rows: s for rows, s in model.speed.passes if _is_time(s)}
        if points and not self.knows(model.id):
            self._curves[group] = BatchTimeCurve(points, measured=True)
            self._nearest_known.clear()
            self._level = 0.0
        if _is_time(model.speed.decode):
            self._decode.setdefault(model.id, model.speed.decode / group.pixels)
        if _is_time(model.speed.encode):
            self._prompt.setdefault(model.id, model.speed.encode)

    def knows(self, model_id: str) -> bool:
        """Whether any batch of this model was measured."""
        return any(group.model == model_id for group in self._curves)

    def adapter_factor(self, model_id: str) -> float:
        """How much longer a batch takes if some of its rows have LoRA adapters; at least 1."""
        cost, _ = self._adapter_cost.get(model_id, (0.0, 0))
        return math.exp(cost)

    def batch_seconds(self, group: Group, rows: float) -> float:
        """One batch of ``rows`` rows without LoRA adapters."""
        if group in self._curves:
            known, equal_rows = group, rows
        elif (nearest := self._nearest(group)) is not None:
            # Assume that a row of twice the pixels costs as much as two rows.
            known, equal_rows = nearest, rows * group.pixels / nearest.pixels
        else:
            return GUESS_SECONDS * rows
        seconds = self._curves[known].at(equal_rows) * math.exp(self._level)
        return min(max(seconds, SHORTEST_SECONDS), LONGEST_SECONDS)

    def optimism(self, group: Group) -> float:
        """The factor, at most 1, from expected seconds to those at the speed of fast batches."""
        known = group if group in self._curves else self._nearest(group)
        if known is None:
            return 1.0
        curve = self._curves[known]
        return math.exp(min(0.0, curve.optimistic_level() - curve.level - self._level))

    def decode_seconds(self, group: Group) -> float:
        """Decoding one image; no batch runs meanwhile."""
        return self._decode.get(group.model, 0.0) * group.pixels

    def encode_seconds(self, group: Group) -> float:
        """Encoding one image as a file; batches continue meanwhile."""
        return self._encode.get(group.model, 0.0) * group.pixels

    def prompt_seconds(self, group: Group) -> float:
        """Encoding a job's prompts; no batch runs meanwhile.

        Whether they are cached is not known before, so it is the time if they are not.
        """
        return self._prompt.get(group.model, 0.0)

    def record_batch(self, event: BatchDone) -> None:
        """Learn from a batch what it takes without ControlNets and LoRA adapters.

        What a batch with LoRA adapters takes besides is learned for each model. The rest of its
        surprise corrects the level, as that of any batch: the machine may have become slower.
        """
        seconds = event.seconds / (1.0 + event.control_cost)
        if not _is_time(seconds):
            return
        group = Group(event.model, event.width, event.height)
        curve = self._curves.pop(group, None)
        if curve is None:
            self._nearest_known.clear()
            known = self._nearest(group)
            if known is None:
                first = seconds / math.exp(self._level)
                curve = BatchTimeCurve({event.rows: first}, measured=False)
            else:
                ratio = group.pixels / known.pixels
                rows = {event.rows, *self._curves[known].points}
                points = {r: self._curves[known].at(r * ratio) for r in rows}
                curve = BatchTimeCurve(points, measured=False)
        expected = max(curve.at(event.rows) * math.exp(self._level), SHORTEST_SECONDS)
        surprise = math.log(seconds / expected)
        if event.adapters:
            surprise -= self._learn_adapter_cost(event.model, surprise)
        level = surprise + curve.level + self._level
        surprise = min(max(surprise, -LARGEST_SURPRISE), LARGEST_SURPRISE)
        curve.learn(event.rows, surprise, level)
        self._level += LEARNING * surprise
        self._curves[group] = curve  # Now the most recently used.
        if len(self._curves) > MAX_GROUPS:
            del self._curves[next(iter(self._curves))]
            self._nearest_known.clear()

    def _learn_adapter_cost(self, model_id: str, surprise: float) -> float:
        """The part of ``surprise`` that adapters explain, after it was learned from."""
        cost, met = self._adapter_cost.get(model_id, (0.0, 0))
        cost += (surprise - cost) * max(LEARNING, 1 / (met + 1))
        cost = min(max(cost, 0.0), LARGEST_ADAPTER_COST)
        self._adapter_cost[model_id] = cost, met + 1
        return cost

    def record_encode(self, event: EncodeDone) -> None:
        """Learn from an encode of prompts that were not cached."""
        _blend(self._prompt, event.model, event.seconds / event.prompts)

    def record_decode(self, event: DecodeDone) -> None:
        """Learn from a decode."""
        _blend(self._decode, event.model, event.seconds / (event.width * event.height))

    def record_job(self, job: Job, stages: StageSeconds) -> None:
        """Learn from a finished job."""
        _blend(self._encode, job.model, stages.encode_image / (job.width * job.height))

    def measured(self) -> Iterator[tuple[Group, int, float]]:
        """Every group and row count seen, with the expected seconds of a batch now."""
        for group, curve in self._curves.items():
            for rows in curve.met:
                yield group, rows, self.batch_seconds(group, rows)

    def _nearest(self, group: Group) -> Group | None:
        """The known group of the same model with the nearest size."""
        if group not in self._nearest_known:
            known = [each for each in self._curves if each.model == group.model]
            if len(self._nearest_known) > MAX_NEAREST:
                self._nearest_known.clear()
            self._nearest_known[group] = min(
                known, key=lambda each: abs(math.log(each.pixels / group.pixels)), default=None
            )
        return self._nearest_known[group]


def _is_time(seconds: float) -> bool:
    return SHORTEST_SECONDS <= seconds <= LONGEST_SECONDS


def _blend(known: dict[str, float], key: str, seconds: float) -> None:
    """Update an EWMA with ``seconds``; an outlier counts as four times the mean at most."""
    if not 0.0 < seconds < LONGEST_SECONDS:
        return
    mean = known.setdefault(key, seconds)
    known[key] = mean + 0.1 * (min(seconds, 4 * mean) - mean)
