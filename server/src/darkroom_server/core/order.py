"""The order of work: one pure function, for the queue's jobs and for the rows of a batch.

Each key has a goal, the time by which it should be done: its arrival, plus patience in proportion
to the remaining work, or a little before the caller's deadline if that is earlier. The earliest
goal goes first. So short work overtakes long work, work that is nearly done finishes, and nothing
starves: a key that arrives more than ``patience`` seconds after another one comes behind it.
"""

import math
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

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
        return self.patience_of(self.remaining_steps)

    @property
    def goal(self) -> float:
        """The time by which the work should be done."""
        return self.goal_of(self.remaining_steps)

    def patience_of(self, steps: int) -> float:
        """The patience if ``steps`` remained."""
        return steps * SECONDS_PER_STEP / 2.0**self.priority

    def goal_of(self, steps: int) -> float:
        """The goal if ``steps`` remained."""
        patience = self.patience_of(steps)
        if self.deadline is not None:
            patience = min(patience, SHARE_OF_DEADLINE * (self.deadline - self.submitted_at))
        return self.submitted_at + patience


Urgency = tuple[float, float, tuple[str, int]]
"""What keys are ordered by: the goal; equal goals by arrival, then by id."""


def urgency(key: OrderKey) -> Urgency:
    """The place of ``key`` among others; the most urgent has the least."""
    return key.goal, key.submitted_at, key.id


def order(keys: Iterable[OrderKey]) -> list[OrderKey]:
    """``keys``, the most urgent first."""
    return sorted(keys, key=urgency)


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


Member = TypeVar("Member", bound=Hashable)


class FairShare(Generic[Member]):
    """Fair share: the member with the least service is next.

    A member that appears, or comes back, starts with the service of the least served member
    present: it has no claim on the time before.
    """

    def __init__(self) -> None:
        self._served: dict[Member, float] = {}

    def next(self, present: Collection[Member]) -> Member:
        """The member whose turn it is; ``present`` are those with work, at least one."""
        known = [self._served[member] for member in present if member in self._served]
        level = min(known, default=0.0)
        self._served = {member: self._served.get(member, level) for member in present}
        return min(self._served, key=lambda member: self._served[member])

    def charge(self, member: Member, service: float) -> None:
        """Count ``service`` to ``member``; ignored if it has no work now."""
        if member in self._served:
            self._served[member] += service


def turns_for(steps: int) -> float:
    """How many turns a group gets, relative to others, if the longest of its batch has ``steps``.

    Long work gets more of them, but not in proportion: short work still ends sooner.
    """
    return math.sqrt(steps)


class OfModel(Protocol):
    """What has a model's id."""

    @property
    def model(self) -> str:
        """The model's id."""

    def __hash__(self) -> int: ...


Group = TypeVar("Group", bound=OfModel)


class Turns(Generic[Group]):
    """Whose batch is next: models share the engine's time, and the groups of a model its turns.

    A turn is a batch, whatever it takes. So images of one model take about as many steps a second,
    large or small, and callers of large images do not wait behind those of small ones.
    ``python -m bench.turns`` compares other rules.
    """

    def __init__(self) -> None:
        self._models: FairShare[str] = FairShare()
        self._groups: dict[str, FairShare[Group]] = {}

    def next(self, present: Collection[Group]) -> Group:
        """The group whose turn it is; ``present`` are those with work, at least one."""
        of_model: dict[str, list[Group]] = {}
        for group in present:
            of_model.setdefault(group.model, []).append(group)
        model = self._models.next(of_model)
        return self._groups.setdefault(model, FairShare()).next(of_model[model])

    def charge(self, group: Group, seconds: float, steps: int) -> None:
        """Count a batch of ``group``, which took ``seconds``; see ``turns_for`` for ``steps``."""
        self._models.charge(group.model, seconds)
        self._groups[group.model].charge(group, 1.0 / turns_for(steps))
