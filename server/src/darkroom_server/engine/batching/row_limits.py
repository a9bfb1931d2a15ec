"""How many rows a batch may have: measured, corrected by real batches, reduced without memory."""

from dataclasses import dataclass
from typing import Self

import structlog

from darkroom_server.core.model import MemoryNeeds, ModelInfo
from darkroom_server.core.model_runtime import RowLimitSource
from darkroom_server.engine.batch import Group
from darkroom_server.engine.batching.row_tuning import RowTuner

log = structlog.get_logger(__name__)

RECOVERY_BATCHES = 1000
"""Successful batches before a reduced row limit is doubled: what used the memory may be gone.

The number doubles each time that the limit is reduced again.
"""

MAX_GROUPS = 64
"""Groups whose corrected limits are kept: callers must not make memory grow."""


@dataclass(slots=True)
class _ReducedLimit:
    """A limit on rows, and the successful batches until it is doubled."""

    rows: int
    recovery_batches: int
    successes: int = 0


class RowLimits:
    """The row limits of one model, by group.

    ``max_rows`` bounds every batch, and ``memory`` bounds those of large images. Real batches
    correct the limit of their own group, up to ``most_rows``; with None they do not. When a batch
    runs out of memory, the limit of its group is reduced for a while. Other groups keep theirs: a
    caller's large images do not slow down small ones.
    """

    def __init__(self, max_rows: int, memory: MemoryNeeds, most_rows: int | None = None) -> None:
        self.max_rows = max_rows
        self.memory = memory
        self._most_rows = most_rows
        self._tuners: dict[Group, RowTuner] = {}
        self._reduced_row_limits: dict[Group, _ReducedLimit] = {}

    @classmethod
    def of_model(cls, model: ModelInfo) -> Self:
        """The limits of ``model``, as they are at its start."""
        fixed = model.limits.row_limit_source is RowLimitSource.SET
        return cls(model.limits.max_rows, model.memory, None if fixed else model.most_rows)

    def of(self, group: Group, held: int | None = None) -> int:
        """Rows that a batch of ``group`` may have, at least 2.

        ``held``: the bytes that unfinished images hold now, see ``MemoryNeeds.rows_that_fit``.
        """
        tuner = self._tuners.get(group)
        return min(tuner.rows if tuner else self.max_rows, self._most_now(group, held))

    def next_rows(self, group: Group, waiting: int, held: int | None = None) -> int:
        """The row limit of the next batch of ``group``, of which ``waiting`` rows wait.

        It is that of ``of``, except in a trial of another limit.
        """
        if self._most_rows is None:
            return self.of(group, held)
        tuner = self._tuners.pop(group, None) or RowTuner(self.of(group), self._most_rows)
        self._tuners[group] = tuner  # Now the most recently used.
        if len(self._tuners) > MAX_GROUPS:
            del self._tuners[next(iter(self._tuners))]
        return tuner.next_rows(waiting, self._most_now(group, held))

    def record_batch(self, group: Group, rows: int, seconds: float) -> bool:
        """Learn from a batch of ``rows`` rows; returns whether the limit of ``group`` changed."""
        tuner = self._tuners.get(group)
        if tuner is None or not tuner.record(rows, seconds):
            return False
        log.info("row limit corrected by real batches", group=str(group), max_rows=tuner.rows)
        return True

    def _most_now(self, group: Group, held: int | None) -> int:
        """The most rows that fit the memory now."""
        fit = self.memory.rows_that_fit(group.width, group.height, held)
        if self._most_rows is None:
            fit = min(fit, self.max_rows)
        reduced = self._reduced_row_limits.get(group)
        return min(fit, reduced.rows) if reduced else fit

    def record_out_of_memory(self, group: Group, rows: int) -> None:
        """Reduce the limit of ``group``, of which a batch of ``rows`` rows ran out of memory."""
        max_rows = max(2, min(self.of(group), rows // 2))
        previous = self._reduced_row_limits.get(group)
        recovery_batches = previous.recovery_batches * 2 if previous else RECOVERY_BATCHES
        self._reduced_row_limits[group] = _ReducedLimit(max_rows, recovery_batches)
        log.warning("row limit reduced", group=str(group), max_rows=max_rows)

    def record_success(self, group: Group) -> None:
        """Count a batch of ``group``; raise a reduced limit after enough of them."""
        reduced = self._reduced_row_limits.get(group)
        most = self._most_rows or self.max_rows
        if reduced is None or reduced.rows >= most:
            return
        reduced.successes += 1
        if reduced.successes >= reduced.recovery_batches:
            reduced.rows, reduced.successes = min(reduced.rows * 2, most), 0
            log.info("row limit raised", group=str(group), max_rows=reduced.rows)
