"""The ledger: every accepted job ends once, in one of four ways."""

from collections import Counter
from enum import StrEnum


class End(StrEnum):
    """How an accepted job ended, as its caller saw it."""

    FINISHED = "finished"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


class Counts:
    """Jobs accepted and ended since the start: ``accepted == ended + live``, always."""

    def __init__(self) -> None:
        self.accepted = 0
        self.by_end: Counter[End] = Counter()

    @property
    def ended(self) -> int:
        """Jobs that ended, in whatever way."""
        return self.by_end.total()

    @property
    def live(self) -> int:
        """Jobs whose callers still wait."""
        return self.accepted - self.ended
