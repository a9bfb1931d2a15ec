"""Real batches correct the row limit, in both directions."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from darkroom_server.core.events import BatchDone, RowLimitCorrected
from darkroom_server.core.model import MemoryNeeds
from darkroom_server.core.model_runtime import RowLimitSource
from darkroom_server.engine.batch import Batch, Group
from darkroom_server.engine.batching.row_limits import RowLimits
from darkroom_server.engine.batching.runner import BatchResult

from .conftest import LoopUnderTest, config_for, make_job
from .test_row_measurement import busy, knee_at

GROUP, OTHER = Group("demo", 64, 64, 77), Group("demo", 128, 64, 77)
ROOMY = MemoryNeeds(pixels=64 * 64, bytes_per_row=1, bytes_per_decode=1, available_bytes=10_000)


def serve(
    limits: RowLimits, seconds: Callable[[int], float], batches: int, waiting: int = 128
) -> list[int]:
    """Run batches that take all the rows that they may; returns the row counts."""
    ran = []
    for _ in range(batches):
        rows = min(waiting, limits.next_rows(GROUP, waiting))
        limits.record_batch(GROUP, rows, seconds(rows))
        ran.append(rows)
    return ran


@pytest.mark.parametrize("knee", [4, 32])
@pytest.mark.parametrize("start", [2, 4, 8, 32, 64])
@pytest.mark.parametrize("seed", range(10))
def test_the_limit_moves_to_the_knee_on_a_busy_machine(knee: int, start: int, seed: int) -> None:
    limits = RowLimits(start, ROOMY, most_rows=64)
    serve(limits, busy(random.Random(seed), knee_at(knee)), 300)
    assert knee / 2 <= limits.of(GROUP) <= knee * 2


@pytest.mark.parametrize(("start", "knee"), [(2, 32), (64, 4), (8, 8)])
def test_the_limit_finds_the_knee_of_a_quiet_machine(start: int, knee: int) -> None:
    limits = RowLimits(start, ROOMY, most_rows=64)
    serve(limits, knee_at(knee), 160)
    assert limits.of(GROUP) == knee
    assert limits.of(OTHER) == start, "each size has its own limit"
    assert serve(limits, knee_at(knee), 2000).count(knee) > 1800, "trials become rare"


def test_a_machine_that_changes_is_followed() -> None:
    limits = RowLimits(8, ROOMY, most_rows=64)
    serve(limits, knee_at(8), 100)
    assert limits.of(GROUP) == 8
    serve(limits, knee_at(32), 500)
    assert limits.of(GROUP) == 32


def test_an_exact_number_is_not_corrected() -> None:
    limits = RowLimits(8, ROOMY)
    assert set(serve(limits, knee_at(64), 300)) == {8}
    assert set(serve(limits, knee_at(2), 300)) == {8}


def test_an_upper_bound_holds() -> None:
    limits = RowLimits(4, ROOMY, most_rows=12)
    assert max(serve(limits, knee_at(64), 300)) == 12
    assert limits.of(GROUP) == 12


def test_the_limit_is_not_raised_to_batches_that_take_too_long() -> None:
    limits = RowLimits(8, ROOMY, most_rows=64)
    ran = serve(limits, lambda rows: 1.5 if rows <= 8 else 2.5, 300)
    assert limits.of(GROUP) == 8
    assert ran.count(16) <= 12


def test_one_slow_batch_does_not_end_a_trial() -> None:
    limits = RowLimits(8, ROOMY, most_rows=16)
    slow = iter([5.0])

    def seconds(rows: int) -> float:
        return next(slow, 0.02) if rows == 16 else 0.02

    serve(limits, seconds, 20)
    assert limits.of(GROUP) == 16


def test_without_enough_waiting_rows_nothing_is_tried() -> None:
    limits = RowLimits(8, ROOMY, most_rows=64)
    assert set(serve(limits, knee_at(64), 300, waiting=6)) == {6}
    assert limits.of(GROUP) == 8


def test_a_trial_ends_if_memory_runs_out() -> None:
    limits = RowLimits(4, ROOMY, most_rows=64)

    def seconds(rows: int) -> float:
        if rows > 4:
            limits.record_out_of_memory(GROUP, rows)
        return 0.02

    ran = serve(limits, seconds, 100)
    assert ran.count(8) == 1
    assert limits.of(GROUP) <= 4


def test_the_sizes_that_are_kept_are_bounded() -> None:
    limits = RowLimits(4, ROOMY, most_rows=64)
    for width in range(8, 8 * 200, 8):
        limits.next_rows(Group("demo", width, 64, 77), 4)
    assert len(limits._tuners) == 64


def test_real_batches_correct_the_limit_of_a_model(tiny_folder: Path, tmp_path: Path) -> None:
    """Through the loop: from batches to the event and to what the next start finds."""
    config = config_for(tiny_folder, rows=None, max_rows=8, measurement_cache=str(tmp_path))
    first = LoopUnderTest(config)
    first.close()
    first.loop._caches["tiny"].save_row_limit(2)  # As if a busy start had measured it.
    loop = LoopUnderTest(config)
    try:
        assert loop.models["tiny"].info.limits.max_rows == 2
        runner = loop.loop._runner
        run = runner.run

        def run_with_a_knee_at_eight(batch: Batch) -> BatchResult:
            result = run(batch)
            result.timer.seconds = lambda: knee_at(8)(batch.rows)  # type: ignore[method-assign]
            return result

        runner.run = run_with_a_knee_at_eight  # type: ignore[method-assign]
        loop.run(*(make_job(f"many-{i}", image_count=4, steps=60) for i in range(4)))
    finally:
        loop.close()
    corrected = [e.max_rows for e in loop.events if isinstance(e, RowLimitCorrected)]
    assert corrected == [4, 8]
    assert max(e.max_rows for e in loop.events if isinstance(e, BatchDone)) == 8
    again = LoopUnderTest(config)
    again.close()
    limits = again.models["tiny"].info.limits
    assert (limits.max_rows, limits.row_limit_source) == (8, RowLimitSource.REMEMBERED)
