"""The order of jobs and rows: no job starves, no limit is exceeded, every step is taken."""

import itertools
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darkroom_server.core.order import FairShare, OrderKey, Turns, order, pick, turns_for

keys = st.builds(
    OrderKey,
    id=st.tuples(st.uuids().map(str), st.integers(0, 3)),
    submitted_at=st.floats(0, 100),
    remaining_steps=st.integers(1, 150),
    priority=st.integers(-2, 2),
    deadline=st.none() | st.floats(0, 200),
    rows=st.integers(1, 2),
    alone=st.booleans(),
)
key_lists = st.lists(keys, min_size=1, max_size=20, unique_by=lambda key: key.id)


def key(name: str, steps: int, submitted_at: float = 0.0, **fields: object) -> OrderKey:
    return OrderKey(
        id=(name, 0),
        remaining_steps=steps,
        submitted_at=submitted_at,
        **fields,  # type: ignore[arg-type]
    )


@given(key_lists, st.integers(2, 16))
def test_a_batch_respects_the_row_limit(candidates: list[OrderKey], max_rows: int) -> None:
    chosen = pick(candidates, max_rows)
    assert chosen
    assert sum(k.rows for k in chosen) <= max_rows
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= set(candidates)
    if any(k.alone for k in chosen):
        assert len(chosen) == 1


@given(key_lists, st.integers(2, 16))
def test_the_most_urgent_sample_is_always_in_the_batch(
    candidates: list[OrderKey], max_rows: int
) -> None:
    assert order(candidates)[0] in pick(candidates, max_rows)


@given(key_lists, st.randoms(use_true_random=False))
def test_the_order_depends_on_the_keys_alone(candidates: list[OrderKey], random: object) -> None:
    shuffled = list(candidates)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert order(shuffled) == order(candidates)


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 2)), min_size=1, max_size=12),
    st.integers(2, 8),
)
def test_every_sample_takes_exactly_its_steps(work: list[tuple[int, int]], max_rows: int) -> None:
    remaining = {i: steps for i, (steps, _) in enumerate(work)}
    taken: Counter[int] = Counter()
    now = 0.0
    while remaining:
        candidates = [
            OrderKey(id=(str(i), i), submitted_at=0, remaining_steps=n, rows=work[i][1])
            for i, n in remaining.items()
        ]
        for chosen in pick(candidates, max_rows):
            taken[chosen.id[1]] += 1
            remaining[chosen.id[1]] -= 1
        remaining = {i: n for i, n in remaining.items() if n}
        now += 0.05
    assert taken == {i: steps for i, (steps, _) in enumerate(work)}


@given(st.integers(1, 8), st.integers(0, 2))
def test_a_long_job_does_not_starve_under_a_flood_of_short_ones(short: int, priority: int) -> None:
    """Each batch takes 0.1 s and one sample; with each batch a more urgent job comes."""
    long = key("long", 40)
    waiting = [long]
    for tick in range(1000):
        now = tick / 10
        waiting.append(key(f"short-{tick}", short, now, priority=priority))
        (chosen,) = pick(waiting, 1)
        if chosen is long:
            assert now <= long.submitted_at + long.patience + short
            return
        waiting.remove(chosen)
    raise AssertionError("the long job never got a step")


@given(key_lists, keys)
def test_a_job_submitted_after_all_goals_is_last(
    candidates: list[OrderKey], late: OrderKey
) -> None:
    goals = [k.submitted_at + k.patience for k in candidates]
    last = replace(late, submitted_at=max(goals) + 1, deadline=None)
    assert order([*candidates, last])[-1] == last


def test_short_work_overtakes_long_work() -> None:
    long, short = key("long", 50), key("short", 8, submitted_at=0.2)
    assert order([long, short])[0] is short


def test_waiting_makes_a_job_urgent() -> None:
    long, short = key("long", 50), key("short", 8, submitted_at=30.0)
    assert order([long, short])[0] is long


def test_the_goal_is_a_little_before_a_near_deadline() -> None:
    assert key("pressed", 20, submitted_at=10.0, deadline=12.0).goal == pytest.approx(11.8)
    assert key("relaxed", 20, submitted_at=10.0, deadline=1000.0).goal == pytest.approx(15.0)


def test_a_near_deadline_makes_a_job_urgent() -> None:
    relaxed, pressed = key("relaxed", 20), key("pressed", 20, deadline=0.5)
    assert order([relaxed, pressed])[0] is pressed


def test_priority_makes_a_job_urgent() -> None:
    assert order([key("low", 8), key("high", 20, priority=2)])[0].id[0] == "high"


def test_the_least_served_group_is_next() -> None:
    fair_share: FairShare[str] = FairShare()
    served: Counter[str] = Counter()
    for _ in range(100):
        group = fair_share.next(["small", "large"])
        served[group] += 1
        fair_share.charge(group, 1.0 if group == "small" else 4.0)
    assert served["small"] == 80
    assert served["large"] == 20


def test_a_new_group_is_not_owed_time_from_before_it_came() -> None:
    fair_share: FairShare[str] = FairShare()
    for _ in range(50):
        fair_share.charge(fair_share.next(["old"]), 1.0)
    taken = []
    for _ in range(10):
        taken.append(fair_share.next(["old", "new"]))
        fair_share.charge(taken[-1], 1.0)
    assert Counter(taken) == {"old": 5, "new": 5}


class OfModel(NamedTuple):
    """A group of images."""

    model: str
    name: str


def run_turns(
    seconds: dict[OfModel, float], steps: dict[OfModel, int], batches: int
) -> Counter[OfModel]:
    """The batches of each group, which all always have work."""
    turns: Turns[OfModel] = Turns()
    taken: Counter[OfModel] = Counter()
    for _ in range(batches):
        group = turns.next(list(seconds))
        taken[group] += 1
        turns.charge(group, seconds[group], steps[group])
    return taken


group_facts = st.dictionaries(
    st.builds(OfModel, st.sampled_from("ab"), st.sampled_from("xyz")),
    st.tuples(st.floats(0.01, 1.0), st.integers(1, 150)),
    min_size=1,
)


@given(group_facts)
def test_groups_of_a_model_get_their_turns_whatever_a_batch_takes(
    facts: dict[OfModel, tuple[float, int]],
) -> None:
    seconds = {group: each for group, (each, _) in facts.items()}
    steps = {group: each for group, (_, each) in facts.items()}
    taken = run_turns(seconds, steps, 500)
    for one, other in itertools.combinations(facts, 2):
        if one.model == other.model:
            # Each is at most one turn of the group with the fewest ahead.
            rounds = [taken[group] / turns_for(steps[group]) for group in (one, other)]
            assert abs(rounds[0] - rounds[1]) <= 1 / turns_for(min(steps.values())) + 1e-9


@given(group_facts)
def test_models_get_the_same_seconds(facts: dict[OfModel, tuple[float, int]]) -> None:
    seconds = {group: each for group, (each, _) in facts.items()}
    taken = run_turns(seconds, {group: steps for group, (_, steps) in facts.items()}, 500)
    served: Counter[str] = Counter()
    for group, count in taken.items():
        served[group.model] += count * seconds[group]  # type: ignore[assignment]
    assert max(served.values()) - min(served.values()) <= max(seconds.values()) + 1e-9


def test_large_images_take_as_many_steps_as_small_ones() -> None:
    small, large = OfModel("demo", "small"), OfModel("demo", "large")
    taken = run_turns({small: 0.1, large: 0.9}, {small: 20, large: 20}, 100)
    assert taken == {small: 50, large: 50}


def test_long_work_gets_more_turns_but_not_in_proportion() -> None:
    short, long = OfModel("demo", "short"), OfModel("demo", "long")
    taken = run_turns({short: 0.1, long: 0.1}, {short: 10, long: 40}, 300)
    assert taken == {short: 100, long: 200}


def test_a_group_that_comes_back_is_not_owed_turns() -> None:
    here, gone = OfModel("demo", "here"), OfModel("demo", "gone")
    turns: Turns[OfModel] = Turns()
    turns.charge(turns.next([here, gone]), 1.0, 20)
    for _ in range(50):
        turns.charge(turns.next([here]), 1.0, 20)
    taken = []
    for _ in range(10):
        taken.append(turns.next([here, gone]))
        turns.charge(taken[-1], 1.0, 20)
    assert Counter(taken) == {here: 5, gone: 5}


def test_a_batch_has_at_most_max_adapters_different_ones() -> None:
    candidates = [
        key("first", 1, adapters=frozenset("a")),
        key("same", 2, adapters=frozenset("a")),
        key("second", 3, adapters=frozenset("b")),
        key("third", 4, adapters=frozenset("c")),
        key("none", 5),
    ]
    named = [k.id[0] for k in pick(candidates, 10, max_adapters=2)]
    assert named == ["first", "same", "second", "none"]
    assert [k.id[0] for k in pick(candidates, 10, max_adapters=1)] == ["first", "same", "none"]
    assert len(pick(candidates, 10)) == 5


def test_a_key_with_more_adapters_than_the_limit_runs_without_other_adapters() -> None:
    candidates = [
        key("many", 1, adapters=frozenset("abc")),
        key("one", 2, adapters=frozenset("d")),
    ]
    assert [k.id[0] for k in pick(candidates, 10, max_adapters=2)] == ["many"]
