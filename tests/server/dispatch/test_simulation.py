"""The simulated queue: cases worked out by hand, a comparison with the loop, bounded cost."""

import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darkroom_server.backends.fake import fake_image
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.events import BatchDone
from darkroom_server.core.model_runtime import ModelSpeed
from darkroom_server.core.order import FairShare, OrderKey, Turns, pick
from darkroom_server.dispatch.estimation.batch_times import BatchTimeModel, Group
from darkroom_server.dispatch.estimation.remaining_work import RemainingWork, RemainingWorkCache
from darkroom_server.dispatch.estimation.simulation import MAX_IMAGES, Load, simulate_queue
from darkroom_server.dispatch.jobs.job import ActiveJob, JobState
from tests.server.jobs import make_job

BATCHES = {2: 1.0, 4: 1.5, 8: 2.5}
SMALL, LARGE = Group("demo", 64, 64), Group("demo", 128, 128)


def make_batch_times(
    decode: float = 0.5, slowness: float = 1.0, encode: float = 0.0
) -> BatchTimeModel:
    model = BatchTimeModel()
    passes = tuple((rows, slowness * seconds) for rows, seconds in BATCHES.items())
    speed = ModelSpeed(passes=passes, decode=decode, encode=encode)
    model.start(replace(fake_model(), speed=speed))
    return model


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
    return Load(
        batch_times=make_batch_times(decode, slowness), max_rows=lambda _: max_rows, jobs=jobs
    )


def test_a_job_alone() -> None:
    simulated = simulate_queue([load()], [work("a", 4)], 64)
    assert simulated.starts == {"a": 0.0}
    assert simulated.finishes["a"] == pytest.approx(4 * 1.0 + 0.5)


def test_jobs_share_batches_and_the_remaining_ones_go_faster() -> None:
    simulated = simulate_queue([load()], [work("a", 4), work("b", 2)], 64)
    assert simulated.finishes["b"] == pytest.approx(2 * 1.5 + 0.5)
    assert simulated.finishes["a"] == pytest.approx(2 * 1.5 + 0.5 + 2 * 1.0 + 0.5)


def test_batches_take_longer_while_a_row_has_adapters() -> None:
    times = make_batch_times()
    times.record_batch(
        BatchDone(model="demo", width=64, height=64, rows=4, seconds=3.0, adapters=1)
    )
    assert times.adapter_factor("demo") == pytest.approx(2.0)
    engine = Load(batch_times=times, max_rows=lambda _: 8, jobs=())
    with_adapters = replace(work("b", 2), adapted=True)
    simulated = simulate_queue([engine], [work("a", 4), with_adapters], 64)
    assert simulated.finishes["b"] == pytest.approx(2 * 3.0 + 0.5)
    assert simulated.finishes["a"] == pytest.approx(2 * 3.0 + 0.5 + 2 * 1.0 + 0.5)
    alone = replace(with_adapters, key=replace(with_adapters.key, alone=True))
    assert simulate_queue([engine], [alone], 64).finishes["b"] == pytest.approx(2 * 2.0 + 0.5)


def test_prompts_that_are_not_encoded_delay_all_jobs() -> None:
    batch_times = make_batch_times(encode=3.0)
    for encoded, before in ((True, 0.0), (False, 3.0)):
        here = replace(work("here", 4), encoded=encoded)
        engine = Load(batch_times=batch_times, max_rows=lambda _: 8, jobs=[here])
        simulated = simulate_queue([engine], [], 64)
        assert simulated.finishes["here"] == pytest.approx(0.5 + before + 4 * 1.0 + 0.5)
        simulated = simulate_queue([engine], [work("new", 4)], 64)
        assert simulated.starts["new"] == pytest.approx(0.5 + before + 3.0)
        assert simulated.finishes["here"] == pytest.approx(0.5 + before + 3.0 + 4 * 1.5 + 0.5)


def test_an_engine_with_a_long_queue_encodes_each_prompt() -> None:
    engine = Load(batch_times=make_batch_times(encode=3.0), max_rows=lambda _: 8, jobs=[])
    waiting = [work(str(i), 4) for i in range(8)]
    few, all = (simulate_queue([engine], waiting, 1, max_images=n) for n in (1, MAX_IMAGES))
    assert few.finishes["7"] == pytest.approx(8 * 3.0 + 4 * 1.0 + 0.5 + 7 * (2.5 + 0.5))
    assert all.finishes["7"] == pytest.approx(8 * (3.0 + 4 * 1.0 + 0.5))


def test_a_new_job_waits_for_the_end_of_a_batch() -> None:
    simulated = simulate_queue([load(work("a", 4, begun=True))], [work("b", 2)], 64)
    assert simulated.starts == {"a": 0.0, "b": 0.5}
    assert simulated.finishes["b"] == pytest.approx(0.5 + 2 * 1.5 + 0.5)


def test_the_most_urgent_jobs_get_the_rows() -> None:
    simulated = simulate_queue([load(max_rows=2)], [work("short", 2), work("long", 4)], 64)
    assert simulated.starts["long"] == simulated.finishes["short"] == pytest.approx(2.5)
    assert simulated.finishes["long"] == pytest.approx(2.5 + 4 + 0.5)


def test_a_job_ends_with_its_last_image() -> None:
    simulated = simulate_queue([load()], [work("a", 4, images=2)], 64)
    assert simulated.finishes["a"] == pytest.approx(4 * 1.5 + 2 * 0.5)


def test_queued_jobs_join_as_places_become_free() -> None:
    simulated = simulate_queue([load()], [work("a", 4), work("b", 2), work("c", 1)], 2)
    assert simulated.joins == {"a": 0.0, "b": 0.0, "c": pytest.approx(2 * 1.5 + 0.5)}
    assert simulated.finishes["c"] == pytest.approx(3.5 + 1.5 + 0.5)


def test_groups_take_turns() -> None:
    """A batch takes 1.0 s or, with four times the pixels, 2.5 s; long work has twice the turns."""
    simulated = simulate_queue([load()], [work("small", 4), work("large", 16, group=LARGE)], 64)
    small = 4 * 1.0 + 8 * 2.5 + 0.5
    assert simulated.finishes["small"] == pytest.approx(small)
    assert simulated.finishes["large"] == pytest.approx(small + 8 * 2.5 + 2.0)


OTHER = Group("other", 64, 64)


def load_of_two_models(*jobs: RemainingWork) -> Load:
    """Batches of "other" have 2 rows and take 4 s; its decodes take no time."""
    times = make_batch_times()
    speed = ModelSpeed(passes=((2, 4.0),), decode=0.0)
    times.start(replace(fake_model(), id="other", speed=speed))
    return Load(batch_times=times, max_rows=lambda _: 8, jobs=jobs)


def test_models_share_the_time() -> None:
    engine = load_of_two_models(work("other", 100, group=OTHER))
    jobs = [work("small", 4), work("large", 4, group=LARGE)]
    simulated = simulate_queue([engine], jobs, 64)
    here, boundary = 4 * 1.0 + 4 * 2.5, 4.0 / 2
    assert simulated.finishes["small"] == pytest.approx(boundary + 2 * here + 0.5, abs=2.0)
    assert simulated.finishes["large"] == pytest.approx(boundary + 2 * here + 2.5, abs=2.0)
    assert simulated.finishes["other"] == pytest.approx(boundary + here + 2.5 + 100 * 4.0)


def test_a_job_of_another_model_waits_unless_it_is_more_urgent() -> None:
    engine = load_of_two_models(work("running", 8))
    later = [work("long", 12, group=OTHER), work("same", 12)]
    simulated = simulate_queue([engine], later, 64)
    ends = 0.5 + 8 * 1.0 + 0.5
    assert simulated.joins["long"] == pytest.approx(ends)
    assert simulated.starts["long"] == pytest.approx(ends)
    assert simulated.joins["same"] >= ends, "none overtakes"
    urgent = simulate_queue([engine], [work("short", 2, group=OTHER)], 64)
    assert urgent.joins["short"] == pytest.approx(0.5)
    assert urgent.finishes["running"] == pytest.approx(ends + 2 * 4.0)


def test_an_exact_job_runs_alone() -> None:
    simulated = simulate_queue([load()], [work("exact", 2, alone=True), work("b", 4)], 64)
    assert simulated.finishes["exact"] == pytest.approx(2 * 1.0 + 0.5)
    assert simulated.finishes["b"] == pytest.approx(2.5 + 4 + 0.5)


def test_the_faster_engine_gets_more_jobs() -> None:
    loads = [load(slowness=3.0, max_rows=2), load(max_rows=2)]
    simulated = simulate_queue(loads, [work(str(i), 4) for i in range(8)], 1)
    assert max(simulated.finishes.values()) < 8 * (4 + 0.5)
    assert len(simulated.finishes) == 8


class EqualTime(Turns[Group]):
    """Another rule: each group gets the same seconds."""

    def __init__(self) -> None:
        self._share: FairShare[Group] = FairShare()

    def next(self, present: Collection[Group]) -> Group:
        return self._share.next(present)

    def charge(self, group: Group, seconds: float, steps: int) -> None:
        self._share.charge(group, seconds)


def run_loop(
    works: Iterable[RemainingWork],
    max_rows: int,
    decode: float,
    rule: Callable[[], Turns[Group]] = Turns,
) -> dict[str, float]:
    """The seconds at which each job ends, by the rule of the engine's loop, batch by batch."""
    times, now, turns = make_batch_times(decode), 0.0, rule()
    by_id = {w.id: w for w in works}
    keys = {id: replace(w.key, remaining_steps=w.calls[0]) for id, w in by_id.items()}
    finishes = {}
    while keys:
        group = turns.next({by_id[id].group for id in keys})
        chosen = pick([k for id, k in keys.items() if by_id[id].group == group], max_rows)
        seconds = times.batch_seconds(group, sum(key.rows for key in chosen))
        turns.charge(group, seconds, max(by_id[key.id[0]].calls[0] for key in chosen))
        now += seconds
        for key in chosen:
            remaining = key.remaining_steps - 1
            keys[key.id[0]] = replace(key, remaining_steps=remaining)
            if not remaining:
                now += times.decode_seconds(group)
                finishes[key.id[0]] = now
                del keys[key.id[0]]
    return finishes


def test_the_simulation_of_several_sizes_matches_the_loop() -> None:
    sizes = [SMALL, LARGE, Group("demo", 96, 96)]
    jobs = [work(str(i), (40, 8, 16, 16)[i % 4], group=sizes[i % 3]) for i in range(12)]
    simulated = simulate_queue([load(max_rows=8)], jobs, sys.maxsize).finishes

    def difference(rule: Callable[[], Turns[Group]]) -> float:
        looped = run_loop(jobs, 8, 0.5, rule)
        assert simulated.keys() == looped.keys()
        return mean(abs(simulated[id] - seconds) for id, seconds in looped.items())

    last = max(simulated.values())
    assert difference(Turns) < 0.02 * last
    assert difference(EqualTime) > 0.06 * last


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
def test_the_simulation_matches_the_loop(
    random_jobs: list[tuple[int, float, float | None]], rows: int
) -> None:
    jobs = [
        work(str(index), steps, submitted_at=at, deadline=deadline)
        for index, (steps, at, deadline) in enumerate(random_jobs)
    ]
    simulated = simulate_queue([load(max_rows=rows)], jobs, sys.maxsize).finishes
    looped = run_loop(jobs, rows, decode=0.5)
    assert simulated.keys() == looped.keys()
    # The decodes after one batch may be simulated in another order.
    for id, seconds in looped.items():
        assert simulated[id] == pytest.approx(seconds, abs=0.5 * rows + 1e-3)


@given(
    st.lists(st.tuples(st.integers(1, 150), st.integers(1, 16), st.booleans()), max_size=60),
    st.integers(1, 64),
    st.integers(1, 3),
)
def test_every_job_ends_after_it_begins(
    random_jobs: list[tuple[int, int, bool]], max_samples: int, engines: int
) -> None:
    jobs = [
        work(str(index), steps, images, alone=alone, group=(SMALL, LARGE)[steps % 2])
        for index, (steps, images, alone) in enumerate(random_jobs)
    ]
    half = len(jobs) // 2
    loads = [load(*jobs[half + i :: engines]) for i in range(engines)]
    simulated = simulate_queue(loads, jobs[:half], max_samples)
    assert set(simulated.finishes) == set(simulated.starts) == {job.id for job in jobs}
    for id, finish in simulated.finishes.items():
        assert 0 <= simulated.starts[id] < finish
    assert set(simulated.joins) == {job.id for job in jobs[:half]}


def test_jobs_beyond_the_simulated_images_are_extrapolated() -> None:
    jobs = [work(f"{i:04}", 4) for i in range(3 * MAX_IMAGES)]
    simulated = simulate_queue([load(decode=0.0)], jobs, 64)
    finishes = [simulated.finishes[job.id] for job in jobs]
    assert finishes == sorted(finishes)
    assert finishes[-1] == pytest.approx(len(jobs) / 4 * 4 * 2.5, rel=0.1)


def test_remaining_work_is_computed_again_only_after_a_change() -> None:
    works = RemainingWorkCache()
    jobs = {id: ActiveJob(make_job(id, image_count=2), fake_model()) for id in "ab"}
    first = works.get(jobs.values())
    assert [work.calls for work in first] == [(4, 4), (4, 4)]
    jobs["b"].remaining[1] = 3
    again = works.get(jobs.values())
    assert again[0] is first[0]
    assert again[1].calls == (4, 3)
    jobs["a"].state = JobState.DENOISING
    jobs["a"].images[0] = fake_image(jobs["a"].job, 0, fake_model(), 2)
    (later,) = works.get([jobs["a"]])
    assert later.begun
    assert later.calls == (4,)


def calls_made(sizes: int) -> int:
    """The Python calls that one estimate makes while that many sizes wait or run."""
    batch_times = make_batch_times()
    jobs = [
        work(str(i), 20 + i % 7, group=Group("demo", 64 + 8 * (i % 24), 64 + 8 * (i // 24)))
        for i in range(sizes)
    ]
    running = Load(batch_times=batch_times, max_rows=lambda _: 8, jobs=jobs[: sizes // 3])
    count = 0

    def profile(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        simulated = simulate_queue([running], jobs[sizes // 3 :], sizes // 3)
    finally:
        sys.setprofile(None)
    assert len(simulated.finishes) == sizes
    return count


def test_the_cost_grows_with_the_sizes_and_not_with_their_square() -> None:
    assert calls_made(192) < 2.5 * calls_made(96)
