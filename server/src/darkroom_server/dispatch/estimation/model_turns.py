"""The groups of one model in the simulation, and how they take turns."""

import heapq
from dataclasses import dataclass, field

from darkroom_server.dispatch.estimation.batch_times import Group
from darkroom_server.dispatch.estimation.remaining_work import RemainingWork


@dataclass(slots=True)
class GroupQueue:
    """The samples of one group: those in its batches, and those that wait for room.

    ``batches``: those it has run until ``served_at``, in the virtual time of its model. ``plan``:
    the number of the last entry in its model's agenda that is about it. ``adapted``: the running
    images that have LoRA adapters. ``turns``: how many it gets, relative to others of its model, in
    ``round_seconds``.
    """

    group: Group
    max_rows: int
    batches: float = 0.0
    served_at: float = 0.0
    plan: int = 0
    rows: int = 0
    adapted: int = 0
    turns: float = 0.0
    round_seconds: float = 0.0
    running: list[tuple[float, int, RemainingWork]] = field(default_factory=list)
    ready: list[tuple[float, float, str, int, int, RemainingWork]] = field(default_factory=list)


@dataclass(slots=True)
class ModelTurns:
    """The groups of one model with a batch, which take turns as ``core.order.Turns`` has it.

    ``virtual`` time counts the rounds in which each group runs its ``turns`` (as in fair queueing),
    and a round takes ``round_seconds``. A group's next finished image has a fixed virtual time
    until its own rows change, so the heap ``agenda`` finds the next one among any number of groups.
    """

    active: dict[Group, GroupQueue] = field(default_factory=dict)
    virtual: float = 0.0
    round_seconds: float = 0.0
    agenda: list[tuple[float, int, GroupQueue]] = field(default_factory=list)

    def add(self, group: GroupQueue, turns: float, seconds: float) -> None:
        """Give a group that has a batch, of ``seconds``, its ``turns`` in each round."""
        group.turns, group.round_seconds = turns, turns * seconds
        self.round_seconds += group.round_seconds
        self.active[group.group] = group
        remaining = max(0.0, group.running[0][0] - group.batches)
        heapq.heappush(self.agenda, (self.virtual + remaining / turns, group.plan, group))

    def remove(self, group: GroupQueue) -> None:
        """Give a group no turns; it may have none already."""
        self.active.pop(group.group, None)
        self.round_seconds = self.round_seconds - group.round_seconds if self.active else 0.0
        group.turns = group.round_seconds = 0.0

    def next_at(self) -> float:
        """The virtual time at which the next image finishes."""
        while self.agenda[0][1] != self.agenda[0][2].plan:
            heapq.heappop(self.agenda)  # The rows of its group have changed since.
        return self.agenda[0][0]

    def service(self) -> float:
        """Seconds that the model gets until the next image finishes."""
        return max(0.0, self.next_at() - self.virtual) * self.round_seconds
