"""Which models make room for another: a pure function over plain data.

The weights of an engine's models stay within a budget. A model whose loss costs least goes first:
the seconds that it takes to bring it back, times how often it is asked for. A pinned one never
goes, and one that has jobs in the engine goes once they have ended.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """A model in an engine's memory.

    ``busy``: it has jobs in the engine. ``demand``: its recent arrivals, weighted by their age.
    """

    id: str
    bytes: int
    pinned: bool = False
    busy: bool = False
    load_seconds: float = 0.0
    demand: float = 0.0

    @property
    def cost(self) -> float:
        """What its loss probably costs, in seconds: for comparing models."""
        return self.load_seconds * self.demand


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How to make room: ``evict`` these now, or wait until the jobs of ``drain`` have ended.

    Nothing is evicted while jobs must end first: until then the models serve others.
    """

    evict: tuple[str, ...] = ()
    drain: tuple[str, ...] = ()
    cost: float = 0.0


def make_room(
    needed: int, budget: float, residents: Iterable[Resident], kept: Collection[str] = ()
) -> Room | None:
    """How ``needed`` bytes fit within ``budget``, None if they do not.

    Models of ``kept`` stay too, as pinned ones do. Idle models go before busy ones, cheap ones
    before dear ones.
    """
    residents = tuple(residents)
    missing = needed + sum(each.bytes for each in residents) - budget
    if missing <= 0:
        return Room()
    able = [each for each in residents if not each.pinned and each.id not in kept]
    chosen: list[Resident] = []
    for each in sorted(able, key=lambda each: (each.busy, each.cost, -each.bytes, each.id)):
        if missing <= 0:
            break
        chosen.append(each)
        missing -= each.bytes
    if missing > 0:
        return None
    # One that was chosen early may not be needed beside a large one that was chosen late.
    for each in sorted(chosen, key=lambda each: (each.busy, each.cost), reverse=True):
        if missing + each.bytes <= 0:
            chosen.remove(each)
            missing += each.bytes
    cost = sum(each.cost for each in chosen)
    drain = tuple(each.id for each in chosen if each.busy)
    if drain:
        return Room(drain=drain, cost=cost)
    return Room(evict=tuple(each.id for each in chosen), cost=cost)
