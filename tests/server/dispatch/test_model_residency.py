"""Which models make room for another, over plain data."""

from hypothesis import given
from hypothesis import strategies as st

from darkroom_server.dispatch.jobs.registry import HALF_LIFE_SECONDS, Demand
from darkroom_server.dispatch.models.residency import Resident, make_room

residents = st.lists(
    st.builds(
        Resident,
        id=st.uuids().map(str),
        bytes=st.integers(0, 10),
        pinned=st.booleans(),
        busy=st.booleans(),
        load_seconds=st.floats(0, 10),
        demand=st.floats(0, 10),
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
def test_a_busy_model_waits_only_if_the_idle_ones_are_not_enough(
    held: list[Resident], needed: int, budget: int
) -> None:
    room = make_room(needed, budget, held)
    if room is None or not room.drain:
        return
    without_idle = sum(each.bytes for each in held if each.busy or each.pinned)
    assert needed + without_idle > budget


def test_the_cheapest_goes_first() -> None:
    held = [
        Resident(id="often", bytes=5, load_seconds=2.0, demand=9.0),
        Resident(id="seldom", bytes=5, load_seconds=2.0, demand=1.0),
        Resident(id="quick", bytes=5, load_seconds=0.1, demand=9.0),
    ]
    room = make_room(5, 15, held)
    assert room is not None
    assert room.evict == ("quick",)
    assert room.cost == held[2].cost
    room = make_room(10, 15, held)
    assert room is not None
    assert set(room.evict) == {"quick", "seldom"}


def test_demand_halves_with_time() -> None:
    demand = Demand()
    demand.record(0.0)
    demand.record(HALF_LIFE_SECONDS)
    assert demand.now(HALF_LIFE_SECONDS) == 1.5
    assert demand.now(2 * HALF_LIFE_SECONDS) == 0.75
