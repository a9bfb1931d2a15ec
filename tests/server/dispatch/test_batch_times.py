"""What is expected of a pass: as it was measured, as it is met, and never nonsense."""

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.events import BatchDone, DecodeDone, StageSeconds
from darkroom_server.core.model import ModelSpeed
from darkroom_server.dispatch.estimation.batch_times import MAX_GROUPS, BatchTimeModel, Group
from tests.server.jobs import make_job

PASSES = ((2, 0.025), (4, 0.036), (8, 0.060), (16, 0.106))
MODEL = replace(fake_model(), speed=ModelSpeed(passes=PASSES, decode=0.04))
SMALL = Group("demo", 64, 64)


def started() -> BatchTimeModel:
    speed = BatchTimeModel()
    speed.start(MODEL)
    return speed


def passed(rows: int, seconds: float, group: Group = SMALL) -> BatchDone:
    model, width, height = group
    return BatchDone(model=model, width=width, height=height, rows=rows, seconds=seconds)


def test_warm_up_is_the_beginning() -> None:
    speed = started()
    assert [speed.batch_seconds(SMALL, rows) for rows, _ in PASSES] == pytest.approx(
        [seconds for _, seconds in PASSES]
    )
    assert speed.batch_seconds(SMALL, 6) == pytest.approx(0.048)
    assert speed.batch_seconds(SMALL, 32) == pytest.approx(0.106 + 16 * 0.046 / 8)
    assert 0.0125 < speed.batch_seconds(SMALL, 1) < 0.025
    assert speed.decode_seconds(SMALL) == pytest.approx(0.04)


def test_a_restarted_engine_does_not_forget() -> None:
    speed = started()
    for _ in range(100):
        speed.record_batch(passed(2, 0.1))
    speed.start(MODEL)
    assert speed.batch_seconds(SMALL, 2) == pytest.approx(0.1, rel=0.01)


def test_nothing_known_is_said() -> None:
    speed = BatchTimeModel()
    speed.start(fake_model())
    assert not speed.knows("demo")
    assert speed.batch_seconds(SMALL, 4) > speed.batch_seconds(SMALL, 2) > 0
    speed.record_batch(passed(2, 0.05))
    assert speed.knows("demo")
    assert speed.batch_seconds(SMALL, 2) == pytest.approx(0.05)


@pytest.mark.parametrize("slowness", [0.3, 3.0])
def test_a_machine_that_changes_is_followed_for_all_rows(slowness: float) -> None:
    speed = started()
    for _ in range(60):
        speed.record_batch(passed(4, 0.036 * slowness))
    assert speed.batch_seconds(SMALL, 4) == pytest.approx(0.036 * slowness, rel=0.05)
    # Not met meanwhile, and moved along: most of the way.
    moved = math.log(speed.batch_seconds(SMALL, 16) / 0.106) / math.log(slowness)
    assert 0.6 < moved <= 1.01


@pytest.mark.parametrize("wrong", [3.008, 0.006])
def test_a_wrong_measurement_is_corrected_by_real_batches(wrong: float) -> None:
    """A busy start measured 8 rows fifty times too slow or ten times too fast."""
    speed = BatchTimeModel()
    points = tuple((rows, wrong if rows == 8 else seconds) for rows, seconds in PASSES)
    speed.start(replace(MODEL, speed=ModelSpeed(passes=points, decode=0.04)))
    for _ in range(20):
        for rows in (4, 8, 16):
            speed.record_batch(passed(rows, dict(PASSES)[rows]))
    for rows, seconds in PASSES:
        assert speed.batch_seconds(SMALL, rows) == pytest.approx(seconds, rel=0.35)


def test_one_slow_pass_is_not_believed() -> None:
    speed = started()
    speed.record_batch(passed(4, 36.0))
    assert speed.batch_seconds(SMALL, 4) < 0.036 * 2


def test_noise_is_averaged() -> None:
    draw, speed = random.Random(0), started()
    found = []
    for _ in range(400):
        rows, seconds = draw.choice(PASSES)
        speed.record_batch(passed(rows, seconds * draw.lognormvariate(0.0, 0.3)))
        found.append(speed.batch_seconds(SMALL, rows) / seconds)
    errors = sorted(abs(ratio - 1) for ratio in found[100:])
    assert errors[len(errors) // 2] < 0.2


def test_another_size_is_taken_for_more_rows() -> None:
    speed = started()
    large = Group("demo", 128, 64)
    assert speed.batch_seconds(large, 4) == pytest.approx(0.060)
    for _ in range(60):
        speed.record_batch(passed(4, 0.2, large))
    assert speed.batch_seconds(large, 4) == pytest.approx(0.2, rel=0.05)
    assert speed.batch_seconds(large, 8) > 0.2
    assert {group for group, _, _ in speed.measured()} == {SMALL, large}


def test_sizes_are_forgotten_so_that_memory_is_bounded() -> None:
    speed = started()
    for width in range(64, 64 + 8 * 200, 8):
        speed.record_batch(passed(2, 0.1, Group("demo", width, 64)))
    assert len({group for group, _, _ in speed.measured()}) == MAX_GROUPS


def test_images_are_learned_by_their_pixels() -> None:
    speed = started()
    for _ in range(100):
        speed.record_decode(DecodeDone(model="demo", width=64, height=64, seconds=0.08))
        stages = StageSeconds(encode_image=0.01, encode_prompt=0.02)
        speed.record_job(make_job(image_count=1), stages)
    assert speed.decode_seconds(Group("demo", 128, 64)) == pytest.approx(0.16, rel=0.01)
    assert speed.encode_seconds(Group("demo", 128, 64)) == pytest.approx(0.02, rel=0.01)
    assert speed.prompt_seconds(SMALL) == pytest.approx(0.02, rel=0.01)


seconds = st.floats() | st.floats(1e-6, 1e6)


@given(
    st.lists(st.tuples(st.integers(1, 64), seconds, st.sampled_from([64, 256, 2048])), max_size=40),
    st.lists(st.tuples(st.integers(1, 64), seconds), max_size=4),
    st.integers(1, 256),
)
def test_always_finite_and_above_zero(
    passes: list[tuple[int, float, int]], measured: list[tuple[int, float]], rows: int
) -> None:
    speed = BatchTimeModel()
    speed.start(replace(MODEL, speed=ModelSpeed(passes=tuple(measured), decode=math.nan)))
    for taken, s, width in passes:
        speed.record_batch(passed(taken, s, Group("demo", width, 64)))
        speed.record_decode(DecodeDone(model="demo", width=width, height=64, seconds=s))
    for width in (64, 512):
        group = Group("demo", width, 64)
        found = speed.batch_seconds(group, rows)
        assert math.isfinite(found)
        assert found > 0
        assert 0 <= speed.decode_seconds(group) < math.inf
        assert speed.batch_seconds(group, 2 * rows) > 0
