"""Batch times come from the warm-up, follow what is measured later, and are always finite."""

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.events import BatchDone, DecodeDone, EncodeDone, StageSeconds
from darkroom_server.core.model_runtime import ModelSpeed
from darkroom_server.dispatch.estimation.batch_times import MAX_GROUPS, BatchTimeModel, Group
from tests.server.jobs import make_job

BATCHES = ((2, 0.025), (4, 0.036), (8, 0.060), (16, 0.106))
MODEL = replace(fake_model(), speed=ModelSpeed(passes=BATCHES, decode=0.04))
SMALL = Group("demo", 64, 64)


def warmed_up() -> BatchTimeModel:
    batch_times = BatchTimeModel()
    batch_times.start(MODEL)
    return batch_times


def batch_done(rows: int, seconds: float, group: Group = SMALL) -> BatchDone:
    model, width, height = group
    return BatchDone(model=model, width=width, height=height, rows=rows, seconds=seconds)


def test_the_warm_up_gives_the_first_batch_times() -> None:
    batch_times = warmed_up()
    assert [batch_times.batch_seconds(SMALL, rows) for rows, _ in BATCHES] == pytest.approx(
        [seconds for _, seconds in BATCHES]
    )
    assert batch_times.batch_seconds(SMALL, 6) == pytest.approx(0.048)
    assert batch_times.batch_seconds(SMALL, 32) == pytest.approx(0.106 + 16 * 0.046 / 8)
    assert 0.0125 < batch_times.batch_seconds(SMALL, 1) < 0.025
    assert batch_times.decode_seconds(SMALL) == pytest.approx(0.04)


def test_measured_batch_times_survive_a_restart() -> None:
    batch_times = warmed_up()
    for _ in range(100):
        batch_times.record_batch(batch_done(2, 0.1))
    batch_times.start(MODEL)
    assert batch_times.batch_seconds(SMALL, 2) == pytest.approx(0.1, rel=0.01)


def test_the_time_of_controlnets_is_not_the_denoisers() -> None:
    batch_times = warmed_up()
    for _ in range(50):
        batch_times.record_batch(replace(batch_done(4, 0.054), control_cost=0.5))
    assert batch_times.batch_seconds(SMALL, 4) == pytest.approx(0.036)


def adapted(rows: int, seconds: float) -> BatchDone:
    return replace(batch_done(rows, seconds), adapters=2)


@pytest.mark.parametrize("slowness", [1.0, 3.0])
def test_what_adapters_cost_is_learned_apart_from_the_machine(slowness: float) -> None:
    batch_times = warmed_up()
    assert batch_times.adapter_factor("demo") == 1.0
    for _ in range(200):
        batch_times.record_batch(adapted(4, slowness * 0.045))
        batch_times.record_batch(batch_done(4, slowness * 0.036))
    assert batch_times.adapter_factor("demo") == pytest.approx(1.25, rel=0.02)
    assert batch_times.batch_seconds(SMALL, 4) == pytest.approx(slowness * 0.036, rel=0.02)
    assert batch_times.adapter_factor("other") == 1.0


def test_one_batch_with_adapters_is_enough_to_know_what_they_cost() -> None:
    batch_times = warmed_up()
    batch_times.record_batch(adapted(4, 0.054))
    assert batch_times.adapter_factor("demo") == pytest.approx(1.5)
    assert batch_times.batch_seconds(SMALL, 4) == pytest.approx(0.036)


def test_adapters_make_no_batch_faster_and_none_much_slower() -> None:
    batch_times = warmed_up()
    batch_times.record_batch(adapted(4, 0.018))
    assert batch_times.adapter_factor("demo") == 1.0
    batch_times = warmed_up()
    batch_times.record_batch(adapted(4, 100.0))
    assert batch_times.adapter_factor("demo") == pytest.approx(4.0)


def test_a_model_without_measurements_is_not_known() -> None:
    batch_times = BatchTimeModel()
    batch_times.start(fake_model())
    assert not batch_times.knows("demo")
    assert batch_times.batch_seconds(SMALL, 4) > batch_times.batch_seconds(SMALL, 2) > 0
    batch_times.record_batch(batch_done(2, 0.05))
    assert batch_times.knows("demo")
    assert batch_times.batch_seconds(SMALL, 2) == pytest.approx(0.05)


@pytest.mark.parametrize("slowness", [0.3, 3.0])
def test_a_machine_that_changes_is_followed_for_all_rows(slowness: float) -> None:
    batch_times = warmed_up()
    for _ in range(60):
        batch_times.record_batch(batch_done(4, 0.036 * slowness))
    assert batch_times.batch_seconds(SMALL, 4) == pytest.approx(0.036 * slowness, rel=0.05)
    # 16 rows were not measured again: their time follows most of the way.
    moved = math.log(batch_times.batch_seconds(SMALL, 16) / 0.106) / math.log(slowness)
    assert 0.6 < moved <= 1.01


@pytest.mark.parametrize("wrong", [3.008, 0.006])
def test_a_wrong_measurement_is_corrected_by_real_batches(wrong: float) -> None:
    """A busy start measured 8 rows fifty times too slow or ten times too fast."""
    batch_times = BatchTimeModel()
    points = tuple((rows, wrong if rows == 8 else seconds) for rows, seconds in BATCHES)
    batch_times.start(replace(MODEL, speed=ModelSpeed(passes=points, decode=0.04)))
    for _ in range(20):
        for rows in (4, 8, 16):
            batch_times.record_batch(batch_done(rows, dict(BATCHES)[rows]))
    for rows, seconds in BATCHES:
        assert batch_times.batch_seconds(SMALL, rows) == pytest.approx(seconds, rel=0.35)


def test_one_slow_batch_has_little_effect() -> None:
    batch_times = warmed_up()
    batch_times.record_batch(batch_done(4, 36.0))
    assert batch_times.batch_seconds(SMALL, 4) < 0.036 * 2


def test_noise_is_averaged() -> None:
    random_source, batch_times = random.Random(0), warmed_up()
    found = []
    for _ in range(400):
        rows, seconds = random_source.choice(BATCHES)
        batch_times.record_batch(batch_done(rows, seconds * random_source.lognormvariate(0.0, 0.3)))
        found.append(batch_times.batch_seconds(SMALL, rows) / seconds)
    errors = sorted(abs(ratio - 1) for ratio in found[100:])
    assert errors[len(errors) // 2] < 0.2


def test_a_larger_size_starts_with_the_time_of_more_rows() -> None:
    batch_times = warmed_up()
    large = Group("demo", 128, 64)
    assert batch_times.batch_seconds(large, 4) == pytest.approx(0.060)
    for _ in range(60):
        batch_times.record_batch(batch_done(4, 0.2, large))
    assert batch_times.batch_seconds(large, 4) == pytest.approx(0.2, rel=0.05)
    assert batch_times.batch_seconds(large, 8) > 0.2
    assert {group for group, _, _ in batch_times.measured()} == {SMALL, large}


def test_the_number_of_measured_sizes_is_bounded() -> None:
    batch_times = warmed_up()
    for width in range(64, 64 + 8 * 200, 8):
        batch_times.record_batch(batch_done(2, 0.1, Group("demo", width, 64)))
    assert len({group for group, _, _ in batch_times.measured()}) == MAX_GROUPS


def test_decode_and_encode_times_scale_with_the_pixels() -> None:
    batch_times = warmed_up()
    for _ in range(100):
        batch_times.record_decode(DecodeDone(model="demo", width=64, height=64, seconds=0.08))
        stages = StageSeconds(encode_image=0.01)
        batch_times.record_job(make_job(image_count=1), stages)
    assert batch_times.decode_seconds(Group("demo", 128, 64)) == pytest.approx(0.16, rel=0.01)
    assert batch_times.encode_seconds(Group("demo", 128, 64)) == pytest.approx(0.02, rel=0.01)


def test_the_time_of_a_prompt_is_that_of_one_that_is_not_cached() -> None:
    batch_times = BatchTimeModel()
    assert batch_times.prompt_seconds(SMALL) == 0.0
    batch_times.start(replace(MODEL, speed=ModelSpeed(passes=BATCHES, encode=0.5)))
    assert batch_times.prompt_seconds(SMALL) == 0.5
    for _ in range(100):
        batch_times.record_encode(EncodeDone(model="demo", prompts=2, seconds=2.0, cache_bytes=0))
        batch_times.record_job(make_job(image_count=1), StageSeconds(encode_prompt=0.001))
    assert batch_times.prompt_seconds(SMALL) == pytest.approx(1.0, rel=0.01)


seconds = st.floats() | st.floats(1e-6, 1e6)


@given(
    st.lists(st.tuples(st.integers(1, 64), seconds, st.sampled_from([64, 256, 2048])), max_size=40),
    st.lists(st.tuples(st.integers(1, 64), seconds), max_size=4),
    st.integers(1, 256),
)
def test_always_finite_and_above_zero(
    batches: list[tuple[int, float, int]], measured: list[tuple[int, float]], rows: int
) -> None:
    batch_times = BatchTimeModel()
    batch_times.start(replace(MODEL, speed=ModelSpeed(passes=tuple(measured), decode=math.nan)))
    for count, s, width in batches:
        batch_times.record_batch(batch_done(count, s, Group("demo", width, 64)))
        batch_times.record_decode(DecodeDone(model="demo", width=width, height=64, seconds=s))
    for width in (64, 512):
        group = Group("demo", width, 64)
        found = batch_times.batch_seconds(group, rows)
        assert math.isfinite(found)
        assert found > 0
        assert 0 <= batch_times.decode_seconds(group) < math.inf
        assert batch_times.batch_seconds(group, 2 * rows) > 0
