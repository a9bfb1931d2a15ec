"""Who goes first: one pure function, for jobs that wait and for the rows of the next pass.

Each key has a goal, the moment by which it should be done: its arrival, plus patience in
proportion to the work that remains, or a little before the caller's deadline where that is nearer.
The nearest goal goes first. So short work overtakes long work, what is nearly done is finished, and
nobody starves: whatever arrives later than ``patience`` seconds after a key comes behind it.
"""

from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

SECONDS_PER_STEP = 0.25
"""Patience for one step; 40 steps let an 8-step job pass that comes up to 8 seconds later."""

SHARE_OF_DEADLINE = 0.9
"""Of the time until its deadline a job shall take this much: what is finished a moment too late is
work for nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderKey:
    """What the order knows of a job or a sample.

    ``submitted_at``, ``deadline``: ``time.monotonic`` seconds. ``remaining_steps``: denoiser calls
    still to make, over all images of a job. ``priority``: each level up halves the patience.
    ``rows``: taken in a pass. ``alone``: shares no pass.
    """

    id: tuple[str, int]
    submitted_at: float
    remaining_steps: int
    priority: int = 0
    deadline: float | None = None
    rows: int = 1
    alone: bool = False

    @property
    def patience(self) -> float:
        """Seconds after arrival within which the work should be done."""
        return self.remaining_steps * SECONDS_PER_STEP / 2.0**self.priority

    @property
    def goal(self) -> float:
        """The moment by which the work should be done."""
        patience = self.patience
        if self.deadline is not None:
            patience = min(patience, SHARE_OF_DEADLINE * (self.deadline - self.submitted_at))
        return self.submitted_at + patience


def order(keys: Iterable[OrderKey]) -> list[OrderKey]:
    """``keys`` with the most urgent first; equals in the order of arrival, then by id."""
    return sorted(keys, key=lambda key: (key.goal, key.submitted_at, key.id))


def pick(keys: Sequence[OrderKey], max_rows: int) -> list[OrderKey]:
    """The keys of the next pass, together at most ``max_rows`` rows, most urgent first.

    The most urgent key is always among them, be it wider than ``max_rows``, so that each gets its
    turn. A key that is ``alone`` gets a pass of its own when it is the most urgent.
    """
    chosen: list[OrderKey] = []
    rows = 0
    for key in order(keys):
        if not chosen and key.alone:
            return [key]
        if key.alone or (chosen and rows + key.rows > max_rows):
            continue
        chosen.append(key)
        rows += key.rows
    return chosen


Group = TypeVar("Group", bound=Hashable)


class FairShare(Generic[Group]):
    """Counts what each group was served, and gives the next turn to the least served.

    A group that appears, or comes back, starts level with the least served of those present: it
    has no claim on the time before it came.
    """

    def __init__(self) -> None:
        self._served: dict[Group, float] = {}

    def next(self, present: Collection[Group]) -> Group:
        """The group whose turn it is; ``present`` are those with work, and not empty."""
        known = [self._served[group] for group in present if group in self._served]
        level = min(known, default=0.0)
        self._served = {group: self._served.get(group, level) for group in present}
        return min(self._served, key=lambda group: self._served[group])

    def charge(self, group: Group, seconds: float) -> None:
        """Count ``seconds`` of service to ``group``."""
        if group in self._served:
            self._served[group] += seconds
