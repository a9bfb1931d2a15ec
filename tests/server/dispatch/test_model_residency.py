"""Which models make room for another, over plain data."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darkroom_server.dispatch.jobs.registry import HALF_LIFE_SECONDS, Demand
from darkroom_server.dispatch.models.residency import Resident, Room, held_bytes, make_room

residents = st.lists(
    st.builds(
        Resident,
        id=st.uuids().map(str),
        bytes=st.integers(0, 10),
        pinned=st.booleans(),
        busy=st.booleans(),
        load_seconds=st.floats(0, 10),
        rate=st.floats(0, 10),
    ),
    max_size=8,
    unique_by=lambda each: each.id,
)


@given(residents, st.integers(0, 12), st.integers(0, 60), st.data())
def test_room_is_within_the_budget_and_takes_nothing_that_must_stay(
    held: list[Resident], needed: int, budget: int, data: st.DataObject
) -> None:
    kept = data.draw(st.sets(st.sampled_from([each.id for each in held]))) if held else set()
    room = make_room(needed, budget, held, kept)
    must_stay = [each for each in held if each.pinned or each.id in kept]
    least = needed + sum(each.bytes for each in must_stay)
    if room is None:
        assert least > budget
        return
    by_id = {each.id: each for each in held}
    gone = {*room.evict, *room.drain}
    assert not gone & {each.id for each in must_stay}
    assert not any(by_id[id].busy for id in room.evict)
    assert all(by_id[id].busy for id in room.drain)
    if room.drain:
        assert not room.evict
        return
    remaining = sum(each.bytes for each in held if each.id not in gone)
    assert needed + remaining <= budget
    # Nothing is evicted that need not be.
    assert all(needed + remaining + by_id[id].bytes > budget for id in gone)


@given(residents, st.integers(0, 12), st.integers(0, 60))
def test_a_dear_model_goes_only_if_the_cheaper_ones_are_not_enough(
    held: list[Resident], needed: int, budget: int
) -> None:
    room = make_room(needed, budget, held)
    gone = {*room.evict, *room.drain} if room is not None else set()
    if not gone:
        return
    dearest = max(each.cost for each in held if each.id in gone)
    others = sum(each.bytes for each in held if each.pinned or each.cost >= dearest)
    assert needed + others > budget


def test_idle_models_go_before_busy_ones_and_unused_ones_first() -> None:
    held = [
        Resident(id="busy", bytes=5, busy=True, drain_seconds=2.0, last_used=1.0),
        Resident(id="new", bytes=5, last_used=9.0),
        Resident(id="old", bytes=5, last_used=2.0),
    ]
    assert make_room(5, 15, held) == Room(evict=("old",))
    assert make_room(10, 15, held) == Room(evict=("old", "new"))
    assert make_room(15, 15, held) == Room(drain=("busy",), drain_seconds=2.0)


def test_the_cheapest_goes_first() -> None:
    held = [
        Resident(id="often", bytes=5, load_seconds=2.0, rate=9.0),
        Resident(id="seldom", bytes=5, load_seconds=2.0, rate=1.0),
        Resident(id="quick", bytes=5, load_seconds=0.1, rate=9.0),
    ]
    room = make_room(5, 15, held)
    assert room is not None
    assert room.evict == ("quick",)
    assert room.cost == held[2].cost
    room = make_room(10, 15, held)
    assert room is not None
    assert set(room.evict) == {"quick", "seldom"}


def test_the_rate_is_that_of_the_arrivals_seen() -> None:
    demand = Demand()
    for second in range(0, 3000, 5):
        demand.record(float(second))
    assert demand.rate(3000.0, 0.0) == pytest.approx(0.2, rel=0.02)
    assert demand.rate(3100.0, 0.0) == pytest.approx(1 / 105), "nobody came since"
    first = Demand()
    first.record(0.0)
    assert first.rate(0.1, 0.0) < 0.06, "one arrival says little"


def test_demand_halves_with_time() -> None:
    demand = Demand()
    demand.record(0.0)
    demand.record(HALF_LIFE_SECONDS)
    assert demand.now(HALF_LIFE_SECONDS) == 1.5
    assert demand.now(2 * HALF_LIFE_SECONDS) == 0.75


def test_what_models_share_counts_once() -> None:
    """Two models of 10 bytes have 6 in common, and fit where one and a half would."""
    encoder = {"text encoder": 6}
    first, second = (Resident(id=id, bytes=10, shared=encoder) for id in "ab")
    assert held_bytes([(10, encoder), (10, encoder), (3, {})]) == 17
    assert make_room(10, 14, [first], shared=encoder) == Room()
    assert make_room(10, 14, [first]) == Room(evict=("a",)), "the negative control"
    assert make_room(10, 18, [first, second], shared=encoder) == Room()
    assert make_room(10, 14, [first, second], shared=encoder) == Room(evict=("a",))
    # While one of them stays, so does what they share; once both are gone, it is free.
    assert make_room(5, 15, [first, second]) == Room(evict=("a",))
    assert make_room(6, 15, [first, second]) == Room(evict=("a", "b"))
    pinned = Resident(id="p", bytes=10, shared=encoder, pinned=True)
    assert make_room(6, 15, [first, pinned]) is None
