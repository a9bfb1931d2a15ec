"""Estimates are corrected by their past errors, and no correction rejects jobs forever."""

import math
import time

import pytest

from darkroom_server.core.errors import DeadlineExceeded
from darkroom_server.dispatch.estimation.calibration import REJECTIONS, Calibration
from tests.server.clock import Clock
from tests.server.dispatch.harness import dispatching, timed_engine
from tests.server.jobs import make_job


def test_estimates_are_corrected_by_their_past_errors() -> None:
    calibration = Calibration()
    assert calibration.factor(3.0) == 1.0
    calibration.learn(3.0, 6.0)
    assert 1.0 < calibration.factor(3.0) < 1.2  # One error changes little.
    for _ in range(200):
        calibration.learn(3.0, 6.0)
    assert calibration.factor(2.5) == pytest.approx(2.0, rel=0.01)
    assert calibration.factor(0.5) == 1.0
    for seconds, real in ((0.0, 1.0), (1.0, 0.0), (1e-300, 1e300), (math.inf, 1.0)):
        calibration.learn(seconds, real)
    assert all(math.isfinite(calibration.factor(s)) for s in (0.0, 1e-300, 1.0, 1e300))


def test_expired_jobs_are_learned_from_too() -> None:
    calibration = Calibration()
    for _ in range(200):
        calibration.learn(3.0, 3.0)
    calibration.expired(3.0, had=2.0)  # It had less time than estimated: nothing is learned.
    assert calibration.factor(3.0) == pytest.approx(1.0)
    for _ in range(200):
        calibration.expired(3.0, had=6.0)
    assert calibration.factor(3.0) > 2.0


async def test_an_expired_job_raises_the_estimates_of_similar_jobs(clock: Clock) -> None:
    async with dispatching(timed_engine(), max_resident_samples=2) as (dispatcher, engine):
        before = dispatcher.estimate(make_job(steps=8))
        assert before is not None
        deadline = time.monotonic() + 2 * before.total
        late = dispatcher.submit(make_job("late", steps=8, deadline=deadline))
        clock.skip(3 * before.total)
        with pytest.raises(DeadlineExceeded):
            await late.result()
        engine.advance()  # The engine removes the expired job.
        after = dispatcher.estimate(make_job(steps=8))
        assert after is not None
        assert after.total / after.simulated > before.total / before.simulated


def test_a_factor_that_rejects_all_jobs_of_one_length_decays() -> None:
    calibration = Calibration()

    def learn(forecast: float, real: float) -> None:
        for _ in range(200):
            calibration.learn(forecast, real)

    def reject(times: int) -> None:
        for _ in range(times):
            calibration.rejected(3.0)

    learn(3.0, 8.0)
    learn(30.0, 60.0)
    high = calibration.factor(3.0)
    reject(REJECTIONS - 1)
    assert calibration.factor(3.0) == high
    calibration.learn(3.0, 8.0)  # Some jobs are accepted, so the factor can still correct itself.
    reject(REJECTIONS - 1)
    assert calibration.factor(3.0) == pytest.approx(high, rel=0.01)
    reject(1)
    assert calibration.factor(3.0) == pytest.approx(math.sqrt(high), rel=0.01)
    reject(10 * REJECTIONS)
    assert calibration.factor(3.0) == pytest.approx(1.0, abs=0.01)
    assert calibration.factor(30.0) == pytest.approx(2.0, rel=0.01)
    # A factor that shortens estimates rejects no job, so it does not decay.
    learn(3.0, 1.5)
    reject(10 * REJECTIONS)
    assert calibration.factor(3.0) == pytest.approx(0.5, rel=0.02)


async def test_a_factor_decays_while_another_job_runs(clock: Clock) -> None:
    async with dispatching(timed_engine(), max_resident_samples=2) as (dispatcher, engine):
        for index in range(70):  # The machine was busy: each job took three times as long.
            slow = dispatcher.submit(make_job(str(index), steps=8))
            clock.skip(3 * 8.5)
            engine.advance(8)
            await slow.result()
        dispatcher.submit(make_job("other", steps=1000))
        estimate = dispatcher.estimate(make_job(steps=8))
        assert estimate is not None
        deadline = 1.7 * estimate.simulated
        rejected = 0
        while rejected <= 5 * REJECTIONS:
            try:
                dispatcher.submit(make_job(steps=8, deadline=time.monotonic() + deadline))
                break
            except DeadlineExceeded:
                rejected += 1
        assert REJECTIONS <= rejected <= 5 * REJECTIONS


async def test_estimates_learn_from_actual_times() -> None:
    async with dispatching(timed_engine()) as (dispatcher, engine):
        # The fake engine takes no time, so it is far faster than it was measured.
        for index in range(20):
            active = dispatcher.submit(make_job(str(index), steps=4))
            engine.advance(4)
            await active.result()
        estimate = dispatcher.estimate(make_job(steps=4))
    assert estimate is not None
    assert estimate.simulated == pytest.approx(4.5)
    assert estimate.total < 3.0
