"""When a model is loaded in place of another: pure functions over plain data.

Jobs of models that are in memory go first. The jobs of another model wait until they are enough to
pay for the swap, but no longer than a bound: then it is due, and its load begins in time.

Each swap makes jobs of the models that make room wait until those are back. If it is made for more
jobs at once, there are fewer swaps, but these jobs wait for each other. Both together are least at
the economic order quantity (Harris 1913): sqrt(2 × arrivals per second × cost of a swap) jobs. For
a rarely used model that is a single one, for a hot one in place of another hot one it is a queue.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from darkroom_server.dispatch.models.residency import Resident, Room, Shared, make_room

SWAP_WEIGHT = 4.0
"""How often the waiting that a swap causes counts, for the device is less busy meanwhile.

With 1, two hot models with place for one would spend most of the time for loads, with 4 a third.
"""

AGAIN_SECONDS = 1.0
"""Until it is asked again whether a load pays: the longer nobody comes, the sooner it does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A model that is to be loaded; times are ``time.monotonic`` seconds.

    ``turn_seconds``: until another load can follow, because the jobs that wait for this one run
    first. ``jobs``: their number; the first of them has waited since ``since``. ``rate``: jobs of
    it that arrive per second. ``due``: by when it should be in memory; ``-math.inf`` if an admin
    wants it. ``held_by``: the indexes of the engines that have or load it already, and have no
    place for these jobs. ``not_yet``: those of the engines that must read it, or another model,
    into the host's memory first. ``shared``: the part of its ``bytes`` that other models may hold
    too, as far as that is known.
    """

    id: str
    bytes: int = 0
    shared: Shared = field(default_factory=dict)
    load_seconds: float = 0.0
    turn_seconds: float = 0.0
    jobs: int = 0
    rate: float = 0.0
    since: float = 0.0
    due: float = math.inf
    held_by: frozenset[int] = frozenset()
    not_yet: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineView:
    """An engine that is ready, with its ``residents``, whose weights stay within ``budget``.

    ``loading``: it loads a model now, for about ``free_in`` seconds more; the ``budget`` is what
    that leaves. ``making_room_for``: the model for which others began to make room, "" if there is
    none. ``samples``: the images in it; ``full``: it takes no more.
    """

    budget: float
    residents: Sequence[Resident]
    loading: bool = False
    free_in: float = 0.0
    making_room_for: str = ""
    samples: int = 0
    full: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """A model that an engine loads once it has ``room``: at once, or when jobs have ended."""

    model: str
    room: Room


@dataclass(slots=True)
class SwapPlan:
    """What to do now: at most one swap in each engine, by its index.

    In an engine that loads a model, others only begin to make room for the next one.
    ``too_large``: models that no engine has room for, even without jobs. ``again_at``: when to plan
    again if nothing happens, infinite if no model waits.
    """

    swaps: dict[int, Swap] = field(default_factory=dict)
    too_large: list[Wanted] = field(default_factory=list)
    again_at: float = math.inf

    def add(self, index: int, swap: Swap, engine: EngineView) -> None:
        """Make a swap, or let models make room for it while the engine loads another one.

        They serve others until the drain would take longer than that load. What made room already
        gets no jobs again.
        """
        room = swap.room
        if engine.loading:
            begun = engine.making_room_for == swap.model
            if not begun and not (room.drain and engine.free_in <= room.drain_seconds):
                return
            room = replace(room, evict=(), drain=(*room.evict, *room.drain))
            if not room.drain:
                return
        self.swaps[index] = replace(swap, room=room)


class SwapPolicy:
    """The order of the loads, what makes room for them, and whether that pays."""

    def order(self, wanted: Iterable[Wanted], now: float) -> tuple[list[Wanted], list[Wanted]]:
        """The models whose loads must begin now, and the others, each with the next one first.

        Of the others, the load that most jobs wait for, for each second that it takes: so the sum
        of all waiting times is least (Smith's rule). Models that an engine has already come last.
        """
        by_due = _by_due(wanted)
        starts = latest_starts(by_due)
        late = next((i for i, start in enumerate(starts) if start > now), len(starts))
        others = by_due[late:]
        others.sort(
            key=lambda each: (bool(each.held_by), -each.jobs / max(each.load_seconds, 1e-3))
        )
        return by_due[:late], others

    def room(
        self, wanted: Wanted, residents: Sequence[Resident], budget: float, *, due: bool
    ) -> Room | None:
        """What makes room for a load; None if nothing may, or if it does not pay yet.

        A model that has jobs in the queue makes room only for one that is ``due``, and before them.
        """
        kept = [
            each.id for each in residents if each.queued and not (due and wanted.due < each.due)
        ]

        def cost(each: Resident) -> float:
            return waiting_caused(wanted, each) + each.drain_seconds * wanted.jobs

        room = make_room(wanted.bytes, budget, residents, kept, cost, shared=wanted.shared)
        if room is None or due:
            return room
        going = {*room.evict, *room.drain}
        caused = sum(waiting_caused(wanted, each) for each in residents if each.id in going)
        enough = math.sqrt(2.0 * SWAP_WEIGHT * wanted.rate * caused)
        return room if wanted.jobs >= enough else None


def plan_swaps(
    policy: SwapPolicy, wanted: Iterable[Wanted], engines: Sequence[EngineView], now: float
) -> SwapPlan:
    """The swaps that begin or go on now; ``wanted`` are models that no engine has or loads.

    They may also be models that only some have (``held_by``). One for which others began to make
    room is loaded: else they would have done it in vain.
    """
    plan = SwapPlan()
    absent = {each.id: each for each in wanted}
    able = dict(enumerate(engines))
    for index, engine in list(able.items()):
        begun = absent.get(engine.making_room_for)
        if begun is not None and (found := find_room(policy, begun, {index: engine}, due=True)):
            plan.add(index, found[1], engine)
            del able[index], absent[begun.id]
    due, others = policy.order(absent.values(), now)
    later = []
    for each, is_due in in_turn(due, others):
        if found := find_room(policy, each, able, due=is_due):
            index, swap = found
            plan.add(index, swap, able.pop(index))
        elif each.held_by or not engines:
            continue
        elif not any(may_fit(each, engine) for engine in engines):
            plan.too_large.append(each)
        elif not is_due:
            later.append(each)
    if later:
        plan.again_at = min(next_start(later), now + AGAIN_SECONDS)
    return plan


def in_turn(due: Iterable[Wanted], others: Iterable[Wanted]) -> Iterator[tuple[Wanted, bool]]:
    """What ``SwapPolicy.order`` found, in that order, and of each whether it is due."""
    yield from ((each, True) for each in due)
    yield from ((each, False) for each in others)


def find_room(
    policy: SwapPolicy, wanted: Wanted, engines: Mapping[int, EngineView], *, due: bool
) -> tuple[int, Swap] | None:
    """The engine where room for a load costs least, None if it must wait."""
    found = [
        (room.cost, engine.samples, index, Swap(model=wanted.id, room=room))
        for index, engine in engines.items()
        if index not in wanted.held_by | wanted.not_yet
        and not (wanted.held_by and engine.full)
        and (room := policy.room(wanted, engine.residents, engine.budget, due=due)) is not None
    ]
    if not found:
        return None
    *_, index, swap = min(found, key=lambda each: each[:3])
    return index, swap


def latest_starts(by_due: Sequence[Wanted]) -> list[float]:
    """When each load must begin so that it and those after it end by their ``due``.

    They run one after another, in the order of ``by_due``.
    """
    starts: list[float] = []
    start = math.inf
    for each in reversed(by_due):
        turn = max(each.load_seconds, each.turn_seconds)
        start = min(start - turn, each.due - each.load_seconds)
        starts.append(start)
    return starts[::-1]


def next_start(wanted: Iterable[Wanted]) -> float:
    """When the first of these loads must begin; infinite without any."""
    return min(latest_starts(_by_due(wanted)), default=math.inf)


def waiting_caused(wanted: Wanted, resident: Resident) -> float:
    """Seconds that jobs of ``resident`` wait in all if it makes room for ``wanted``.

    It is away while its jobs end, while the other is loaded, and while it is brought back.
    """
    away = resident.drain_seconds + wanted.load_seconds + resident.load_seconds
    return away * (resident.queued + resident.rate * away / 2.0)


def may_fit(wanted: Wanted, engine: EngineView) -> bool:
    """Whether it has room once all jobs have ended, or may have when its load has ended."""
    if engine.loading:
        return True
    room = make_room(wanted.bytes, engine.budget, engine.residents, shared=wanted.shared)
    return room is not None


def _by_due(wanted: Iterable[Wanted]) -> list[Wanted]:
    return sorted(wanted, key=lambda each: (each.due, each.since, each.id))
