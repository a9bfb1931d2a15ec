"""How many rows a batch may have: measured at warm-up, and reduced after an allocation failed."""

from dataclasses import dataclass

import structlog

from darkroom_server.core.model import MemoryNeeds
from darkroom_server.engine.batch import Group

log = structlog.get_logger(__name__)

RECOVERY_BATCHES = 1000
"""Successful batches before a reduced row limit is doubled: what used the memory may be gone.

The number doubles each time that the limit is reduced again.
"""


@dataclass(slots=True)
class _ReducedLimit:
    """A limit on rows, and the successful batches until it is doubled."""

    rows: int
    recovery_batches: int
    successes: int = 0


class RowLimits:
    """The row limits of one model, by group.

    ``max_rows`` bounds every batch, and ``memory`` bounds those of large images. When a batch runs
    out of memory, the limit of its group is reduced for a while. Other groups keep theirs: a
    caller's large images do not slow down small ones.
    """

    def __init__(self, max_rows: int, memory: MemoryNeeds) -> None:
        self.max_rows = max_rows
        self.memory = memory
        self._reduced_row_limits: dict[Group, _ReducedLimit] = {}

    def of(self, group: Group) -> int:
        """Rows that a batch of ``group`` may have now, at least 2."""
        limit = min(self.max_rows, self.memory.rows_that_fit(group.width, group.height))
        reduced = self._reduced_row_limits.get(group)
        return min(limit, reduced.rows) if reduced else limit

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
        if reduced is None or reduced.rows >= self.max_rows:
            return
        reduced.successes += 1
        if reduced.successes >= reduced.recovery_batches:
            reduced.rows, reduced.successes = min(reduced.rows * 2, self.max_rows), 0
            log.info("row limit raised", group=str(group), max_rows=reduced.rows)
