"""When models are swapped: the policy over plain data, with an engine and a clock of numbers."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.trace.policies import InOrderOfArrival
from darkroom_server.dispatch.jobs.registry import Demand
from darkroom_server.dispatch.models.residency import Resident, Room
from darkroom_server.dispatch.models.swaps import (
    AGAIN_SECONDS,
    SWAP_WEIGHT,
    EngineView,
    SwapPolicy,
    Wanted,
    latest_starts,
    plan_swaps,
)


@dataclass(frozen=True)
class Model:
    bytes: int = 1
    load_seconds: float = 1.0


@dataclass
class World:
    """One engine, in which each job takes ``run`` seconds, beside any number of others.

    It holds to what the planner holds to: one load at a time, and no job of a model that makes room
    enters. ``waits`` are the seconds of each job from its arrival until it enters, in their order.
    """

    models: dict[str, Model]
    budget: int = 1
    bound: float = 10.0
    run: float = 0.5
    policy: SwapPolicy = field(default_factory=SwapPolicy)
    pinned: frozenset[str] = frozenset()

    now: float = 0.0
    loads: list[str] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._running: dict[str, list[float]] = {}
        self._queue: list[tuple[float, str]] = []
        self._loading: tuple[float, str] | None = None
        self._leaving: set[str] = set()
        self._making_room_for = ""
        self._demand: defaultdict[str, Demand] = defaultdict(Demand)
        self._again_at = math.inf

    def serve(self, arrivals: Iterable[tuple[float, str]]) -> None:
        """Serve all ``arrivals``, moments with models, to their end."""
        due = sorted(arrivals, reverse=True)
        while due or self._queue or self._loading or any(self._running.values()):
            moments = [end for ends in self._running.values() for end in ends]
            if due:
                moments.append(due[-1][0])
            if self._loading is not None:
                moments.append(self._loading[0])
            moments.append(max(self.now, self._again_at))
            self.now = min(moments)
            assert self.now < math.inf, "jobs wait, and nothing is done about it"
            while due and due[-1][0] <= self.now:
                self._queue.append(due.pop())
                self._demand[self._queue[-1][1]].record(self.now)
            self._end()
            self._enter()
            self._plan()
            self._enter()

    def _end(self) -> None:
        for id, ends in self._running.items():
            self._running[id] = [end for end in ends if end > self.now]
        if self._loading is not None and self._loading[0] <= self.now:
            self._running[self._loading[1]] = []
            self._loading = None

    def _enter(self) -> None:
        for job in self._queue.copy():
            at, model = job
            if model in self._running and model not in self._leaving:
                self._queue.remove(job)
                self.waits.append(self.now - at)
                self._running[model].append(self.now + self.run)

    def _plan(self) -> None:
        held = {*self._running, *([self._loading[1]] if self._loading else [])}
        wanted = [self._wanted(id) for id in {id for _, id in self._queue} - held]
        coming = self.models[self._loading[1]].bytes if self._loading is not None else 0
        view = EngineView(
            budget=self.budget - coming,
            residents=[self._resident(id) for id in self._running],
            loading=self._loading is not None,
            free_in=self._loading[0] - self.now if self._loading is not None else 0.0,
            making_room_for=self._making_room_for,
        )
        plan = plan_swaps(self.policy, wanted, [view], self.now)
        assert not plan.too_large
        self._leaving, self._making_room_for, self._again_at = set(), "", plan.again_at
        if (swap := plan.swaps.get(0)) is None:
            return
        if swap.room.drain:
            self._leaving, self._making_room_for = set(swap.room.drain), swap.model
            return
        assert self._loading is None
        for id in swap.room.evict:
            assert not self._running.pop(id), f"{id} has jobs"
            assert id not in self.pinned
        self._loading = self.now + self.models[swap.model].load_seconds, swap.model
        self.loads.append(swap.model)
        assert sum(self.models[id].bytes for id in (*self._running, swap.model)) <= self.budget

    def _wanted(self, id: str) -> Wanted:
        since = [at for at, model in self._queue if model == id]
        load = self.models[id].load_seconds
        return Wanted(
            id=id,
            bytes=self.models[id].bytes,
            load_seconds=load,
            turn_seconds=load + self.run,
            jobs=len(since),
            rate=self._demand[id].rate(self.now, 0.0),
            since=min(since),
            due=min(since) + self.bound,
        )

    def _resident(self, id: str) -> Resident:
        ends = self._running[id]
        queued = [at for at, model in self._queue if model == id]
        return Resident(
            id=id,
            bytes=self.models[id].bytes,
            pinned=id in self.pinned,
            busy=bool(ends),
            drain_seconds=max(ends, default=self.now) - self.now,
            queued=len(queued),
            due=min(queued, default=math.inf) + self.bound,
            load_seconds=self.models[id].load_seconds,
            rate=self._demand[id].rate(self.now, 0.0),
            last_used=self._demand[id].at,
        )


@st.composite
def worlds(choose: st.DrawFn) -> tuple[World, list[tuple[float, str]]]:
    """Models of different sizes, and arrivals in bursts."""
    count = choose(st.integers(2, 6))
    sizes = st.builds(
        Model, bytes=st.integers(1, 3), load_seconds=st.sampled_from([0.1, 0.5, 1.0, 3.0])
    )
    models = {f"m{n}": choose(sizes) for n in range(count)}
    arrivals = choose(
        st.lists(
            st.tuples(
                st.floats(0.0, 60.0, allow_nan=False), st.sampled_from([*models, "m0", "m0"])
            ),
            max_size=60,
        )
    )
    budget = choose(st.integers(3, 7))
    run = choose(st.sampled_from([0.1, 0.5, 2.0]))
    return World(models, budget=budget, run=run), arrivals


@settings(max_examples=150, deadline=None)
@given(worlds(), st.sampled_from([0.0, 2.0, 10.0]))
def test_every_job_enters_and_budgets_hold(
    world_and_arrivals: tuple[World, list[tuple[float, str]]], bound: float
) -> None:
    """``World`` asserts at each step that the budget holds and that nothing with jobs goes."""
    world, arrivals = world_and_arrivals
    world.bound = bound
    world.serve(arrivals)
    assert len(world.waits) == len(arrivals)


@settings(max_examples=150, deadline=None)
@given(worlds())
def test_nobody_waits_longer_than_the_bound(
    world_and_arrivals: tuple[World, list[tuple[float, str]]],
) -> None:
    """If the bound is long enough to load every model once in turn."""
    world, arrivals = world_and_arrivals
    loads = [each.load_seconds for each in world.models.values()]
    world.bound = sum(loads) + world.run * len(loads)
    world.serve(arrivals)
    assert max(world.waits, default=0.0) <= world.bound + max(loads) + world.run + 1e-6


def steady(model: str, seconds: float, until: float = 120.0) -> list[tuple[float, str]]:
    return [(n * seconds, model) for n in range(int(until / seconds))]


def test_a_rare_model_does_not_wait_longer_than_the_bound_beside_a_hot_one() -> None:
    arrivals = [*steady("hot", 0.1), (31.0, "rare")]
    waits = {}
    for bound in (10.0, 1000.0):
        world = World({"hot": Model(load_seconds=3.0), "rare": Model()}, bound=bound)
        world.serve(arrivals)
        waits[bound] = max(world.waits)
    assert waits[10.0] <= 10.0 + 3.0 + 0.5
    assert waits[1000.0] > 60.0, "it waits until the hot one is not hot any more"


def test_one_job_of_a_rare_model_pays_beside_others() -> None:
    """Nobody waits in vain where a swap costs nobody much."""
    models = {"a": Model(load_seconds=2.0), "b": Model(load_seconds=2.0)}
    world = World(models, bound=30.0)
    world.serve([(0.0, "a"), (40.0, "b"), (80.0, "a"), (120.0, "b")])
    assert world.loads == ["a", "b", "a", "b"]
    assert max(world.waits) == pytest.approx(2.0)


def swaps_of(policy: SwapPolicy, seconds: float, load: float) -> World:
    """Two models of equal demand, one place, and jobs of both in turns."""
    models = {"a": Model(load_seconds=load), "b": Model(load_seconds=load)}
    world = World(models, policy=policy, bound=12.0, run=0.2)
    arrivals = [*steady("a", seconds), *((at + seconds / 2, "b") for at, _ in steady("a", seconds))]
    world.serve(arrivals)
    return world


@pytest.mark.parametrize("seconds", [0.2, 0.5, 1.0])
def test_two_models_of_equal_demand_do_not_thrash(seconds: float) -> None:
    ours = swaps_of(SwapPolicy(), seconds, load=1.0)
    theirs = swaps_of(InOrderOfArrival(), seconds, load=1.0)
    assert max(ours.waits) <= 12.0 + 1.0 + 0.2
    assert len(ours.loads) * 1.0 <= 120.0 / 3, "a third of the time is spent for loads, at most"
    assert len(theirs.loads) > 2 * len(ours.loads)


def test_the_model_that_most_jobs_wait_for_is_loaded_first() -> None:
    few = Wanted(id="few", load_seconds=1.0, jobs=1, since=0.0, due=10.0)
    many = Wanted(id="many", load_seconds=1.0, jobs=3, since=1.0, due=11.0)
    slow = Wanted(id="slow", load_seconds=4.0, jobs=3, since=1.0, due=11.0)
    policy = SwapPolicy()
    assert policy.order([few, many, slow], 1.0) == ([], [many, few, slow])
    due, others = policy.order([few, many, slow], 5.5)
    assert [each.id for each in due] == ["few"]
    assert [each.id for each in others] == ["many", "slow"]
    assert policy.order([few, many, slow], 20.0)[1] == []
    admin = Wanted(id="admin", due=-math.inf)
    assert policy.order([few, admin], 0.0) == ([admin], [few])


def test_loads_begin_early_enough_for_all_that_follow() -> None:
    by_due = [
        Wanted(id="a", load_seconds=1.0, due=10.0),
        Wanted(id="b", load_seconds=4.0, due=11.0),
        Wanted(id="c", load_seconds=1.0, due=30.0),
    ]
    assert latest_starts(by_due) == [6.0, 7.0, 29.0]
    turns = [replace(each, turn_seconds=5.0) for each in by_due]
    assert latest_starts(turns) == [2.0, 7.0, 29.0]


def room(wanted: Wanted, residents: Sequence[Resident], *, due: bool = False) -> Room | None:
    return SwapPolicy().room(wanted, residents, len(residents), due=due)


def test_what_is_missed_least_makes_room() -> None:
    one = Wanted(id="new", bytes=1, load_seconds=1.0, jobs=1, rate=0.1, due=10.0)
    hot = Resident(id="hot", bytes=1, load_seconds=1.0, rate=2.0)
    cold = Resident(id="cold", bytes=1, load_seconds=1.0, rate=0.01)
    busy = replace(cold, id="busy", busy=True, drain_seconds=0.5)
    rarest = room(one, [hot, cold])
    assert rarest is not None
    assert rarest.evict == ("cold",)
    assert rarest.cost == pytest.approx(0.02)
    found = room(one, [hot, busy])
    assert found is not None
    assert (found.drain, found.drain_seconds) == (("busy",), 0.5)


def test_a_swap_pays_for_as_many_jobs_as_the_economic_order_quantity() -> None:
    """Of the hot model 4 jobs come in the 2 seconds that it is away, each waits 1 on average."""
    hot = Resident(id="hot", bytes=1, load_seconds=1.0, rate=2.0)
    needed = {}
    for rate in (0.01, 0.1, 1.0):
        wanted = Wanted(id="new", bytes=1, load_seconds=1.0, rate=rate, due=10.0)
        needed[rate] = next(n for n in range(99) if room(replace(wanted, jobs=n), [hot]))
        assert needed[rate] == math.ceil(math.sqrt(2 * SWAP_WEIGHT * rate * 4.0))
        assert room(replace(wanted, jobs=1), [hot], due=True) is not None
    assert needed[0.01] == 1
    assert needed[1.0] > 4


def test_a_model_with_waiting_jobs_stays_until_another_is_due_before_them() -> None:
    wanted = Wanted(id="new", bytes=1, load_seconds=1.0, jobs=9, due=10.0)
    queued = Resident(id="old", bytes=1, queued=1, due=11.0)
    assert room(wanted, [queued]) is None
    assert room(wanted, [queued], due=True) is not None
    assert room(wanted, [replace(queued, due=9.0)], due=True) is None


def test_what_fits_nowhere_is_found_out_and_the_others_go_on() -> None:
    huge, fits = Wanted(id="huge", bytes=5, jobs=1), Wanted(id="fits", bytes=1, jobs=1)
    pinned = Resident(id="pinned", bytes=1, pinned=True)
    view = EngineView(budget=5, residents=[pinned])
    plan = plan_swaps(SwapPolicy(), [huge, fits], [view], 0.0)
    assert plan.too_large == [huge]
    assert plan.swaps[0].model == "fits"
    loading = replace(view, loading=True)
    assert not plan_swaps(SwapPolicy(), [huge], [loading], 0.0).too_large, "that is not known yet"
    assert not plan_swaps(SwapPolicy(), [huge], [], 0.0).too_large


def test_a_load_goes_to_the_cheapest_engine() -> None:
    hot = Resident(id="hot", bytes=1, load_seconds=1.0, rate=1.0)
    cold = replace(hot, id="cold", rate=0.1)
    wanted = Wanted(id="new", bytes=1, load_seconds=1.0, jobs=3)
    views = [EngineView(budget=1, residents=[each]) for each in (hot, cold)]
    assert list(plan_swaps(SwapPolicy(), [wanted], views, 0.0).swaps) == [1]


def test_an_engine_that_makes_room_for_a_model_loads_that_one() -> None:
    old = Resident(id="old", bytes=1)
    first = Wanted(id="first", bytes=1, load_seconds=1.0, jobs=1, since=1.0, due=20.0)
    more = Wanted(id="more", bytes=1, load_seconds=1.0, jobs=5, since=2.0, due=21.0)
    view = EngineView(budget=1, residents=[old], making_room_for="first")
    assert plan_swaps(SwapPolicy(), [first, more], [view], 3.0).swaps[0].model == "first"
    free = replace(view, making_room_for="")
    assert plan_swaps(SwapPolicy(), [first, more], [free], 3.0).swaps[0].model == "more"


def test_models_make_room_for_the_next_one_while_another_is_loaded() -> None:
    busy = Resident(id="old", bytes=1, busy=True, drain_seconds=2.0, due=9.0)
    wanted = Wanted(id="new", bytes=1, load_seconds=1.0, jobs=1, due=10.0)
    view = EngineView(budget=1, residents=[busy], loading=True, free_in=1.0)
    swap = plan_swaps(SwapPolicy(), [wanted], [view], 3.0).swaps[0]
    assert (swap.room.evict, swap.room.drain) == ((), ("old",))
    long = replace(view, free_in=3.0)
    assert not plan_swaps(SwapPolicy(), [wanted], [long], 3.0).swaps, "it serves others until then"
    idle = replace(view, residents=[replace(busy, busy=False, drain_seconds=0.0)])
    assert not plan_swaps(SwapPolicy(), [wanted], [idle], 3.0).swaps
    begun = replace(idle, making_room_for="new")
    kept = plan_swaps(SwapPolicy(), [wanted], [begun], 3.0).swaps[0]
    assert (kept.room.evict, kept.room.drain) == ((), ("old",)), "it gets no jobs again"
    free = replace(begun, loading=False, free_in=0.0)
    assert plan_swaps(SwapPolicy(), [wanted], [free], 3.0).swaps[0].room.evict == ("old",)


def test_a_model_that_must_be_read_first_is_not_loaded_yet() -> None:
    view = EngineView(budget=1, residents=[])
    wanted = Wanted(id="new", bytes=1, load_seconds=1.0, jobs=1, due=10.0)
    waits = replace(wanted, not_yet=frozenset({0}))
    for now in (0.0, 20.0):
        assert not plan_swaps(SwapPolicy(), [waits], [view], now).swaps
        assert plan_swaps(SwapPolicy(), [wanted], [view], now).swaps
    both = plan_swaps(SwapPolicy(), [waits], [view, view], 0.0).swaps
    assert list(both) == [1]


def test_a_load_that_does_not_pay_begins_when_it_is_due() -> None:
    hot = Resident(id="hot", bytes=1, load_seconds=1.0, rate=2.0)
    wanted = Wanted(id="new", bytes=1, load_seconds=1.0, jobs=1, rate=1.0, due=10.0)
    view = EngineView(budget=1, residents=[hot])
    for now, again in ((3.0, 3.0 + AGAIN_SECONDS), (8.5, 9.0)):
        waits = plan_swaps(SwapPolicy(), [wanted], [view], now)
        assert (waits.swaps, waits.again_at) == ({}, again)
    assert plan_swaps(SwapPolicy(), [wanted], [view], 9.0).swaps[0].model == "new"
