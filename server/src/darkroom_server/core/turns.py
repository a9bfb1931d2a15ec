"""Whose turn it is among groups that cannot share a pass: the least served goes first."""

from collections.abc import Collection, Hashable
from typing import Generic, TypeVar

Group = TypeVar("Group", bound=Hashable)


class Turns(Generic[Group]):
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
