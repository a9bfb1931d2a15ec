"""The order of work: one pure function, for the queue's jobs and for the rows of a batch.

Each key has a goal, the time by which it should be done: its arrival, plus patience in proportion
to the remaining work, or a little before the caller's deadline if that is earlier. The earliest
goal goes first. So short work overtakes long work, work that is nearly done finishes, and nothing
starves: a key that arrives more than ``patience`` seconds after another one comes behind it.
"""

from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

SECONDS_PER_STEP = 0.25
"""Patience for one step. A job of 8 steps overtakes one of 40 that arrived up to 8 s earlier."""

SHARE_OF_DEADLINE = 0.9
"""The part of the time until its deadline within which a job should be done. A job that is late by
a moment wastes all its work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderKey:
    """The properties of a job or a sample that decide its order.

    ``submitted_at``, ``deadline``: ``time.monotonic`` seconds. ``remaining_steps``: denoiser calls
    remaining, over all images of a job. ``priority``: each level up halves the patience.
    ``rows``: its rows in a batch. ``alone``: shares no batch. ``adapters``: those of its rows.
    """

    id: tuple[str, int]
    submitted_at: float
    remaining_steps: int
    priority: int = 0
    deadline: float | None = None
    rows: int = 1
    alone: bool = False
    adapters: frozenset[str] = frozenset()

    @property
    def patience(self) -> float:
        """Seconds after arrival within which the work should be done."""
        return self.remaining_steps * SECONDS_PER_STEP / 2.0**self.priority

    @property
    def goal(self) -> float:
        """The time by which the work should be done."""
        patience = self.patience
        if self.deadline is not None:
            patience = min(patience, SHARE_OF_DEADLINE * (self.deadline - self.submitted_at))
        return self.submitted_at + patience


def order(keys: Iterable[OrderKey]) -> list[OrderKey]:
    """``keys``, the most urgent first; equal goals by arrival, then by id."""
    return sorted(keys, key=lambda key: (key.goal, key.submitted_at, key.id))


def pick(
    keys: Sequence[OrderKey], max_rows: int, max_adapters: int | None = None
) -> list[OrderKey]:
    """The keys of the next batch, together at most ``max_rows`` rows, most urgent first.

    Together they have at most ``max_adapters`` different adapters, None: any number. The most
    urgent key is always included, even if it alone has more rows than ``max_rows``, so that none
    starves. A key that is ``alone`` gets a batch of its own when it is the most urgent.
    """
    chosen: list[OrderKey] = []
    rows = 0
    adapters: frozenset[str] = frozenset()
    for key in order(keys):
        if not chosen and key.alone:
            return [key]
        if key.alone or (chosen and rows + key.rows > max_rows):
            continue
        together = adapters | key.adapters
        if chosen and max_adapters is not None and len(together) > max_adapters:
            continue
        chosen.append(key)
        rows += key.rows
        adapters = together
    return chosen


Group = TypeVar("Group", bound=Hashable)


class FairShare(Generic[Group]):
    """Fair share: the group with the least served time is next.

    A group that appears, or comes back, starts with the served time of the least served group
    present: it has no claim on the time before.
    """

    def __init__(self) -> None:
        self._served: dict[Group, float] = {}

    def next(self, present: Collection[Group]) -> Group:
        """The group whose turn it is; ``present`` are the groups with work, at least one."""
        known = [self._served[group] for group in present if group in self._served]
        level = min(known, default=0.0)
        self._served = {group: self._served.get(group, level) for group in present}
        return min(self._served, key=lambda group: self._served[group])

    def charge(self, group: Group, seconds: float) -> None:
        """Count ``seconds`` of service to ``group``."""
        if group in self._served:
            self._served[group] += seconds
