"""Which models make room for another: a pure function over plain data.

The weights of an engine's models stay within a budget. A model whose loss costs least goes first:
the seconds that it takes to bring it back, times how often it is asked for. A pinned one never
goes, and one that has jobs in the engine goes once they have ended.
"""

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """A model in an engine's memory; times are ``time.monotonic`` seconds.

    ``busy``: it has jobs in the engine, which end in about ``drain_seconds`` if no others follow.
    ``queued``: its jobs that wait for room in the engine; ``due``: when the first of them must be
    in it. ``load_seconds``: to bring it back. ``rate``: jobs of it that arrive per second.
    ``last_used``: when the last one arrived or ended.
    """

    id: str
    bytes: int
    pinned: bool = False
    busy: bool = False
    drain_seconds: float = 0.0
    queued: int = 0
    due: float = math.inf
    load_seconds: float = 0.0
    rate: float = 0.0
    last_used: float = 0.0

    @property
    def cost(self) -> float:
        """The jobs that arrive while it is brought back: what its loss costs, for comparison."""
        return self.load_seconds * self.rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How to make room: ``evict`` these now, or wait until the jobs of ``drain`` have ended.

    Nothing is evicted while jobs must end first: until then the models serve others. That takes
    about ``drain_seconds``. ``cost``: the sum over the models that go.
    """

    evict: tuple[str, ...] = ()
    drain: tuple[str, ...] = ()
    drain_seconds: float = 0.0
    cost: float = 0.0


def make_room(
    needed: int,
    budget: float,
    residents: Iterable[Resident],
    kept: Collection[str] = (),
    cost: Callable[[Resident], float] = lambda each: each.cost,
) -> Room | None:
    """How ``needed`` bytes fit within ``budget``, None if they do not.

    Models of ``kept`` stay too, as pinned ones do. Those of the least ``cost`` go, idle ones first
    among equals, then those that were used longest ago.
    """
    residents = tuple(residents)
    missing = needed + sum(each.bytes for each in residents) - budget
    if missing <= 0:
        return Room()
    able = [each for each in residents if not each.pinned and each.id not in kept]
    costs = {each.id: cost(each) for each in able}
    able.sort(key=lambda each: (costs[each.id], each.busy, each.last_used, -each.bytes, each.id))
    chosen: list[Resident] = []
    for each in able:
        if missing <= 0:
            break
        chosen.append(each)
        missing -= each.bytes
    if missing > 0:
        return None
    # One that was chosen early may not be needed beside a large one that was chosen late.
    for each in reversed(chosen.copy()):
        if missing + each.bytes <= 0:
            chosen.remove(each)
            missing += each.bytes
    total = sum(costs[each.id] for each in chosen)
    drain = tuple(each.id for each in chosen if each.busy)
    if drain:
        seconds = max(each.drain_seconds for each in chosen)
        return Room(drain=drain, drain_seconds=seconds, cost=total)
    return Room(evict=tuple(each.id for each in chosen), cost=total)
