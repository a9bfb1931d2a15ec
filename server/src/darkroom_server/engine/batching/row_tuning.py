"""Corrects the row limit of one group from real batches. Knows no torch.

Hill climbing by paired trials: batches with the limit and with twice or half of it alternate, so
that a busy moment affects both, and the highest rate of each decides. A trial needs enough
waiting rows to fill the larger batch; all its batches do useful work.
"""

import math
from dataclasses import dataclass, field

from darkroom_server.engine.warmup.row_measurement import MAX_BATCH_SECONDS, MIN_GAIN

PAIRS = 9
"""Pairs of batches in a trial."""

LONG_BATCHES = 3
"""Batches of a trial that must take longer than ``MAX_BATCH_SECONDS`` before it is ended."""

KEEP_GAIN = 1.05
"""Below this gain for doubling the rows, half of them is enough. It is less than what raises the
limit, so that noise does not move the limit up and down."""

PAUSE_BATCHES, LONGEST_PAUSE = 50, 6400
"""Batches after a trial upwards and one downwards that changed nothing; doubled each time."""

FULL = 0.75
"""A trial counts batches that have more than this part of its rows."""


@dataclass(slots=True)
class _Trial:
    """``narrow`` and ``wide`` row limits alternate; one of them is the limit now."""

    narrow: int
    wide: int
    upwards: bool
    rates: dict[int, list[float]] = field(init=False)

    def __post_init__(self) -> None:
        self.rates = {self.narrow: [], self.wide: []}

    @property
    def next_rows(self) -> int:
        """The side with fewer batches; the narrow one first."""
        return min(self.rates, key=lambda rows: (len(self.rates[rows]), rows))

    @property
    def complete(self) -> bool:
        """Whether every pair has run."""
        return all(len(found) == PAIRS for found in self.rates.values())

    @property
    def gain(self) -> float:
        """The ratio of the highest rates: other programs can only make a batch slower."""
        return max(self.rates[self.wide]) / max(self.rates[self.narrow])

    def accepts(self) -> bool:
        """Whether the gain moves the limit in the trial's direction."""
        doublings = math.log2(self.wide / self.narrow)
        if self.upwards:
            return self.gain >= float(MIN_GAIN**doublings)
        return self.gain < float(KEEP_GAIN**doublings)


class RowTuner:
    """The row limit ``rows`` of one group, at most ``most``."""

    def __init__(self, rows: int, most: int) -> None:
        self.rows = rows
        self._most = most
        self._trial: _Trial | None = None
        self._upwards = True
        self._rejected = 0
        self._pause = PAUSE_BATCHES
        self._batches_until_trial = 0

    def next_rows(self, waiting: int, most: int) -> int:
        """The limit for the next batch, if ``waiting`` rows wait and at most ``most`` fit now."""
        most = min(most, self._most)
        if self._trial is not None and self._trial.wide > most:
            self._end_trial(accepted=False)  # Memory ran out meanwhile.
        if self._trial is None:
            self._trial = self._new_trial(waiting, most)
        if self._trial is None or waiting < self._trial.wide:
            return min(self.rows, most)
        return self._trial.next_rows

    def record(self, rows: int, seconds: float) -> bool:
        """Count a batch of ``rows`` rows; returns whether ``self.rows`` changed."""
        trial = self._trial
        if trial is None:
            self._batches_until_trial = max(0, self._batches_until_trial - 1)
            return False
        side = trial.next_rows
        if not FULL * side < rows <= side or seconds <= 0:
            return False
        trial.rates[side].append(rows / seconds)
        if side > self.rows and self._takes_too_long(trial):
            self._end_trial(accepted=False)
            return False
        if not trial.complete:
            return False
        accepted = trial.accepts()
        if accepted:
            self.rows = trial.wide if trial.upwards else trial.narrow
        self._end_trial(accepted=accepted)
        return accepted

    def _takes_too_long(self, trial: _Trial) -> bool:
        """Whether each of several wide batches took too long; one may be a busy moment."""
        rates = trial.rates[trial.wide]
        return len(rates) >= LONG_BATCHES and trial.wide / max(rates) > MAX_BATCH_SECONDS

    def _new_trial(self, waiting: int, most: int) -> _Trial | None:
        """The trial in the direction whose turn it is, or in the other one if it cannot go on."""
        if self._batches_until_trial or waiting < min(self.rows, most):
            return None
        wider, narrower = min(2 * self.rows, most), max(2, self.rows // 2)
        can_widen = self.rows < wider <= waiting
        can_narrow = narrower < self.rows
        if can_widen and (self._upwards or not can_narrow):
            return _Trial(self.rows, wider, upwards=True)
        return _Trial(narrower, self.rows, upwards=False) if can_narrow else None

    def _end_trial(self, *, accepted: bool) -> None:
        """Go on in the same direction after a success, else try the other one, then pause."""
        self._trial = None
        if accepted:
            self._rejected, self._pause = 0, PAUSE_BATCHES
            return
        self._upwards = not self._upwards
        self._rejected += 1
        if self._rejected >= 2:
            self._rejected = 0
            self._batches_until_trial = self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
