"""The forecast, on cases worked out by hand, beside the loop itself, and bounded in cost."""

import sys
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darkroom_server.backends.fake import fake_image
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.model import ModelSpeed
from darkroom_server.core.order import OrderKey, pick
from darkroom_server.dispatch.estimation.batch_times import BatchTimeModel, Group
from darkroom_server.dispatch.estimation.remaining_work import RemainingWork, RemainingWorkCache
from darkroom_server.dispatch.estimation.simulation import MAX_IMAGES, Load, simulate_queue
from darkroom_server.dispatch.jobs.job import ActiveJob, JobState
from tests.server.jobs import make_job

PASSES = {2: 1.0, 4: 1.5, 8: 2.5}
SMALL, LARGE = Group("demo", 64, 64), Group("demo", 128, 128)


def speed(decode: float = 0.5, slowness: float = 1.0) -> BatchTimeModel:
    speed = BatchTimeModel()
    passes = tuple((rows, slowness * seconds) for rows, seconds in PASSES.items())
    speed.start(replace(fake_model(), speed=ModelSpeed(passes=passes, decode=decode)))
    return speed


def work(
    id: str, steps: int, images: int = 1, group: Group = SMALL, **changes: object
) -> RemainingWork:
    fields = {"begun": False, "alone": False, "submitted_at": 0.0, "deadline": None, **changes}
    key = OrderKey(
        id=(id, 0),
        submitted_at=fields["submitted_at"],  # type: ignore[arg-type]
        remaining_steps=steps,
        deadline=fields["deadline"],  # type: ignore[arg-type]
        rows=2,
        alone=bool(fields["alone"]),
    )
    begun = bool(fields["begun"])
    return RemainingWork(id=id, group=group, key=key, calls=(steps,) * images, begun=begun)


def load(
    *jobs: RemainingWork, decode: float = 0.5, max_rows: int = 8, slowness: float = 1.0
) -> Load:
    return Load(batch_times=speed(decode, slowness), max_rows=lambda _: max_rows, jobs=jobs)


def test_a_job_alone() -> None:
    forecast = simulate_queue([load()], [work("a", 4)], 64)
    assert forecast.starts == {"a": 0.0}
    assert forecast.finishes["a"] == pytest.approx(4 * 1.0 + 0.5)


def test_jobs_share_passes_and_those_who_are_left_go_faster() -> None:
    forecast = simulate_queue([load()], [work("a", 4), work("b", 2)], 64)
    assert forecast.finishes["b"] == pytest.approx(2 * 1.5 + 0.5)
    assert forecast.finishes["a"] == pytest.approx(2 * 1.5 + 0.5 + 2 * 1.0 + 0.5)


def test_a_newcomer_waits_for_the_end_of_a_pass() -> None:
    forecast = simulate_queue([load(work("a", 4, begun=True))], [work("b", 2)], 64)
    assert forecast.starts == {"a": 0.0, "b": 0.5}
    assert forecast.finishes["b"] == pytest.approx(0.5 + 2 * 1.5 + 0.5)


def test_the_most_urgent_take_the_rows() -> None:
    forecast = simulate_queue([load(max_rows=2)], [work("short", 2), work("long", 4)], 64)
    assert forecast.starts["long"] == forecast.finishes["short"] == pytest.approx(2.5)
    assert forecast.finishes["long"] == pytest.approx(2.5 + 4 + 0.5)


def test_every_image_of_a_job_is_waited_for() -> None:
    forecast = simulate_queue([load()], [work("a", 4, images=2)], 64)
    assert forecast.finishes["a"] == pytest.approx(4 * 1.5 + 2 * 0.5)


def test_what_waits_comes_in_as_places_become_free() -> None:
    forecast = simulate_queue([load()], [work("a", 4), work("b", 2), work("c", 1)], 2)
    assert forecast.joins == {"a": 0.0, "b": 0.0, "c": pytest.approx(2 * 1.5 + 0.5)}
    assert forecast.finishes["c"] == pytest.approx(3.5 + 1.5 + 0.5)


def test_groups_take_turns() -> None:
    """Both make progress: passes of 1.0 s and, with four times the pixels, of 2.5 s."""
    forecast = simulate_queue([load()], [work("small", 5), work("large", 2, group=LARGE)], 64)
    assert forecast.finishes["small"] < 2 * 5 + 3
    assert forecast.finishes["large"] == pytest.approx(5 * 1.0 + 0.5 + 2 * 2.5 + 2.0)


def test_a_job_that_is_exact_has_the_engine_to_itself() -> None:
    forecast = simulate_queue([load()], [work("exact", 2, alone=True), work("b", 4)], 64)
    assert forecast.finishes["exact"] == pytest.approx(2 * 1.0 + 0.5)
    assert forecast.finishes["b"] == pytest.approx(2.5 + 4 + 0.5)


def test_the_faster_engine_takes_more() -> None:
    loads = [load(slowness=3.0, max_rows=2), load(max_rows=2)]
    forecast = simulate_queue(loads, [work(str(i), 4) for i in range(8)], 1)
    assert max(forecast.finishes.values()) < 8 * (4 + 0.5)
    assert len(forecast.finishes) == 8


def loop(works: Iterable[RemainingWork], max_rows: int, decode: float) -> dict[str, float]:
    """The engine's own rhythm, pass by pass."""
    known, now = speed(decode), 0.0
    keys = {w.id: replace(w.key, remaining_steps=w.calls[0]) for w in works}
    finishes = {}
    while keys:
        chosen = pick(list(keys.values()), max_rows)
        now += known.batch_seconds(SMALL, sum(key.rows for key in chosen))
        for key in chosen:
            left = key.remaining_steps - 1
            keys[key.id[0]] = replace(key, remaining_steps=left)
            if not left:
                now += decode
                finishes[key.id[0]] = now
                del keys[key.id[0]]
    return finishes


works = st.lists(
    st.builds(
        lambda steps, at, slack: (steps, float(at), None if slack is None else at + slack),
        st.integers(1, 60),
        st.integers(-60, 0),
        st.none() | st.integers(1, 100),
    ),
    min_size=1,
    max_size=40,
)


@given(works, st.sampled_from([2, 4, 8, 16]))
def test_it_is_what_the_loop_does(drawn: list[tuple[int, float, float | None]], rows: int) -> None:
    jobs = [
        work(str(index), steps, submitted_at=at, deadline=deadline)
        for index, (steps, at, deadline) in enumerate(drawn)
    ]
    forecast = simulate_queue([load(max_rows=rows)], jobs, sys.maxsize).finishes
    really = loop(jobs, rows, decode=0.5)
    assert forecast.keys() == really.keys()
    # The decodes after one batch may be simulated in another order.
    for id, seconds in really.items():
        assert forecast[id] == pytest.approx(seconds, abs=0.5 * rows + 1e-3)


@given(
    st.lists(st.tuples(st.integers(1, 150), st.integers(1, 16), st.booleans()), max_size=60),
    st.integers(1, 64),
    st.integers(1, 3),
)
def test_everything_ends_and_nothing_before_it_begins(
    drawn: list[tuple[int, int, bool]], max_samples: int, engines: int
) -> None:
    jobs = [
        work(str(index), steps, images, alone=alone, group=(SMALL, LARGE)[steps % 2])
        for index, (steps, images, alone) in enumerate(drawn)
    ]
    half = len(jobs) // 2
    loads = [load(*jobs[half + i :: engines]) for i in range(engines)]
    forecast = simulate_queue(loads, jobs[:half], max_samples)
    assert set(forecast.finishes) == set(forecast.starts) == {job.id for job in jobs}
    for id, finish in forecast.finishes.items():
        assert 0 <= forecast.starts[id] < finish
    assert set(forecast.joins) == {job.id for job in jobs[:half]}


def test_what_is_beyond_the_horizon_is_extrapolated() -> None:
    jobs = [work(f"{i:04}", 4) for i in range(3 * MAX_IMAGES)]
    forecast = simulate_queue([load(decode=0.0)], jobs, 64)
    finishes = [forecast.finishes[job.id] for job in jobs]
    assert finishes == sorted(finishes)
    assert finishes[-1] == pytest.approx(len(jobs) / 4 * 4 * 2.5, rel=0.1)


def test_remaining_work_is_computed_again_after_a_change_only() -> None:
    works = RemainingWorkCache()
    jobs = {id: ActiveJob(make_job(id, image_count=2), fake_model()) for id in "ab"}
    first = works.get(jobs.values())
    assert [work.calls for work in first] == [(4, 4), (4, 4)]
    jobs["b"].remaining[1] = 3
    again = works.get(jobs.values())
    assert again[0] is first[0]
    assert again[1].calls == (4, 3)
    jobs["a"].state = JobState.DENOISING
    jobs["a"].images[0] = fake_image(jobs["a"].job, 0)
    (later,) = works.get([jobs["a"]])
    assert later.begun
    assert later.calls == (4,)
