"""Which models make room for another: a pure function over plain data.

The weights of an engine's models stay within a budget. A model whose loss costs least goes first:
the seconds that it takes to bring it back, times how often it is asked for. A pinned one never
goes, and one that has jobs in the engine goes once they have ended.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

Shared = Mapping[str, int]
"""The bytes of components that other models may hold too, by their digest."""

NOTHING: Shared = MappingProxyType({})


def held_bytes(models: Iterable[tuple[int, Shared]]) -> int:
    """The bytes of models, each with its own and its shared ones, of which equal ones count once.

    What a model shares is a part of its bytes.
    """
    alone = 0
    shared: dict[str, int] = {}
    for size, parts in models:
        alone += size - sum(parts.values())
        shared.update(parts)
    return alone + sum(shared.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """A model in an engine's memory; times are ``time.monotonic`` seconds.

    ``busy``: it has jobs in the engine, which end in about ``drain_seconds`` if no others follow.
    ``queued``: its jobs that wait for room in the engine; ``due``: when the first of them must be
    in it. ``load_seconds``: to bring it back. ``rate``: jobs of it that arrive per second.
    ``last_used``: when the last one arrived or ended. ``shared``: the part of its ``bytes`` that
    other models may hold too.
    """

    id: str
    bytes: int
    shared: Shared = field(default_factory=dict)
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
    *,
    shared: Shared = NOTHING,
) -> Room | None:
    """How ``needed`` bytes fit within ``budget``, None if they do not.

    ``shared``: the part of them that other models may hold too.

    Models of ``kept`` stay too, as pinned ones do. Those of the least ``cost`` go, idle ones first
    among equals, then those that were used longest ago.
    """
    staying = list(residents)

    def missing(also: Iterable[Resident] = ()) -> float:
        held = ((each.bytes, each.shared) for each in (*staying, *also))
        return held_bytes(((needed, shared), *held)) - budget

    if missing() <= 0:
        return Room()
    able = [each for each in staying if not each.pinned and each.id not in kept]
    costs = {each.id: cost(each) for each in able}
    able.sort(key=lambda each: (costs[each.id], each.busy, each.last_used, -each.bytes, each.id))
    chosen: list[Resident] = []
    for each in able:
        if missing() <= 0:
            break
        chosen.append(each)
        staying.remove(each)
    if missing() > 0:
        return None
    # One that was chosen early may not be needed beside a large one that was chosen late.
    for each in reversed(chosen.copy()):
        if missing([each]) <= 0:
            chosen.remove(each)
            staying.append(each)
    total = sum(costs[each.id] for each in chosen)
    drain = tuple(each.id for each in chosen if each.busy)
    if drain:
        seconds = max(each.drain_seconds for each in chosen)
        return Room(drain=drain, drain_seconds=seconds, cost=total)
    return Room(evict=tuple(each.id for each in chosen), cost=total)
