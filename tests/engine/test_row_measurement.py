"""The row limit from noisy readings: a fake engine with a known knee, and no torch."""

import random
from collections.abc import Callable

import pytest
import structlog

from darkroom_server.engine.warmup.row_measurement import (
    MAX_SECONDS,
    agreed_seconds,
    best_rows,
    measure_rows,
    row_counts,
)

SIXTEEN = row_counts(16)


class FakeEngine:
    """Batches of known times; ``batches`` are the row counts that ran."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.seconds = seconds
        self.batches: list[int] = []
        self.spent = 0.0

    def __call__(self, rows: int) -> float:
        self.batches.append(rows)
        found = self.seconds(rows)
        self.spent += found
        return found


def knee_at(knee: int, base: float = 0.02) -> Callable[[int], float]:
    """A device with room for ``knee`` rows: more take time in proportion."""
    return lambda rows: base * max(1.0, rows / knee)


def table(*seconds: float) -> Callable[[int], float]:
    """Seconds of 2, 4, 8 and 16 rows; other counts take those of the next smaller one."""
    known = dict(zip((2, 4, 8, 16), seconds, strict=False))
    return lambda rows: known[max(each for each in known if each <= rows)]


def busy(sampling: random.Random, quiet: Callable[[int], float]) -> Callable[[int], float]:
    """Other programs: two thirds of the batches take longer, one in ten up to sixty times."""

    def seconds(rows: int) -> float:
        slowness = 1.0
        if sampling.random() < 0.66:
            slowness += sampling.expovariate(1.0)
        if sampling.random() < 0.1:
            slowness *= sampling.uniform(5, 60)
        return quiet(rows) * slowness * sampling.uniform(1.0, 1.02)

    return seconds


@pytest.mark.parametrize("knee", [4, 32])
def test_the_knee_is_found_on_a_busy_machine(knee: int) -> None:
    found = []
    for seed in range(100):
        engine = FakeEngine(busy(random.Random(seed), knee_at(knee)))
        found.append(best_rows(measure_rows(engine, row_counts(64))))
    assert found.count(knee) >= 95
    assert all(knee / 2 <= each <= knee * 2 for each in found)


@pytest.mark.parametrize("knee", [2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("slowness", [1.0, 1.6])
def test_the_knee_does_not_depend_on_a_load_that_stays(knee: int, slowness: float) -> None:
    sampling = random.Random(knee)
    engine = FakeEngine(lambda rows: knee_at(knee)(rows) * slowness * sampling.uniform(1.0, 1.04))
    assert best_rows(measure_rows(engine, row_counts(64))) == knee


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_a_reading_of_three_seconds_among_48_ms_is_measured_again(which: int) -> None:
    """The reading that a real start believed: 47.8 ms for 4 rows, 3008.4 ms for 8."""
    quiet = table(0.030, 0.0478, 0.0481, 0.0485)

    def seconds(rows: int) -> float:
        return 3.0084 if len(engine.batches) == which + 1 else quiet(rows)

    engine = FakeEngine(seconds)
    with structlog.testing.capture_logs() as logs:
        found = measure_rows(engine, SIXTEEN)
    assert max(found.values()) < 0.05
    assert best_rows(found) == 16
    assert [log for log in logs if log["event"] == "implausible reading, measured again"]


def test_fewer_rows_never_take_longer() -> None:
    """Every batch of 4 rows is slow: those of 8 show that it could not be the rows."""
    found = measure_rows(FakeEngine(table(0.02, 0.09, 0.03, 0.05)), SIXTEEN)
    assert list(found.values()) == sorted(found.values())
    assert found[4] == pytest.approx(0.03)
    assert best_rows(found) == 16


def test_readings_that_never_agree_are_bounded_and_logged() -> None:
    sampling = random.Random(0)
    engine = FakeEngine(lambda rows: knee_at(64)(rows) * sampling.uniform(1, 100))
    with structlog.testing.capture_logs() as logs:
        measure_rows(engine, row_counts(64))
    assert [log for log in logs if log["event"].startswith("measurements do not agree")]
    assert max(map(engine.batches.count, row_counts(64))) < 50
    assert engine.spent < 6 * MAX_SECONDS


def test_a_quiet_machine_is_measured_in_few_interleaved_rounds() -> None:
    engine = FakeEngine(knee_at(64))
    measure_rows(engine, row_counts(64))
    assert engine.batches == [*row_counts(64)] * 3 + [32, 64] * 4


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ((1.0, 1.0, 1.0, 1.9), 8),  # From 8 to 16 rows brings 5 %.
        ((0.1, 0.2, 0.4, 0.8), 2),  # Doubling brings nothing.
        ((0.5, 0.6, 2.1, 9.0), 4),  # Eight take too long for a job to join.
        ((3.0, 3.0, 3.0, 3.0), 2),
    ],
)
def test_best_rows(seconds: tuple[float, ...], best: int) -> None:
    assert best_rows(measure_rows(FakeEngine(table(*seconds)), SIXTEEN)) == best


@pytest.mark.parametrize("noisy", [2, 4, 8, 16])
def test_a_noisy_moment_does_not_decide_the_row_limit(noisy: int) -> None:
    quiet = table(0.1, 0.12, 0.14, 0.27)

    def seconds(rows: int) -> float:
        # Others had the machine for a moment.
        disturbed = rows == noisy and engine.batches.count(rows) in (2, 3)
        return quiet(rows) + 0.07 * disturbed

    engine = FakeEngine(seconds)
    assert best_rows(measure_rows(engine, SIXTEEN)) == 8


def test_a_slow_moment_at_the_start_does_not_keep_images_apart() -> None:
    quiet = table(0.1, 0.12, 0.14, 0.16)
    engine = FakeEngine(lambda rows: quiet(rows) + 5.0 * (len(engine.batches) == 1))
    assert best_rows(measure_rows(engine, SIXTEEN)) == 16


def test_a_machine_that_becomes_slower_meanwhile_has_the_same_knee() -> None:
    quiet = table(0.010, 0.012, 0.015, 0.019)
    engine = FakeEngine(lambda rows: quiet(rows) * 1.02 ** len(engine.batches))
    assert best_rows(measure_rows(engine, SIXTEEN)) == 16


def test_best_rows_keeps_to_what_fits() -> None:
    flat = table(1.0, 1.0, 1.0, 1.0)
    assert best_rows(measure_rows(FakeEngine(flat), row_counts(5))) == 5
    assert best_rows(measure_rows(FakeEngine(flat), row_counts(4))) == 4
    assert best_rows(measure_rows(FakeEngine(flat), row_counts(1))) == 2
    # Five rows in the time of four are worth it, and six in half as much again are not.
    assert best_rows({2: 1.0, 4: 1.4, 6: 2.1}) == 4


def test_a_slow_model_is_measured_by_two_batches() -> None:
    """Eight seconds a batch, as SD 1.4 on two cores: the start must not take minutes."""
    engine = FakeEngine(table(8.0))
    measure_rows(engine, row_counts(64))
    assert engine.batches == [2, 2]
    assert agreed_seconds(lambda: engine(2)) == 8.0
    assert engine.batches == [2, 2, 2]


def test_row_counts_without_memory_are_not_measured() -> None:
    def seconds(rows: int) -> float:
        if rows > 4:
            raise MemoryError("injected")
        return 1.0

    assert list(measure_rows(seconds, row_counts(64))) == [2, 4]
    with pytest.raises(MemoryError):
        measure_rows(lambda rows: seconds(rows + 4), row_counts(64))


def test_one_work_is_measured_until_its_readings_agree() -> None:
    readings = iter([3.0, 0.5, 0.2, 0.1, 0.101])
    assert agreed_seconds(lambda: next(readings)) == 3.0, "a slow one is the only one"
    assert agreed_seconds(lambda: next(readings)) == 0.1
    assert not list(readings)
