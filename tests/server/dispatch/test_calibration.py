"""Forecasts are corrected by how they were off, and no correction shuts the door for good."""

import math
import time

import pytest

from darkroom_server.core.errors import DeadlineExceeded
from darkroom_server.dispatch.estimation.calibration import REJECTIONS, Calibration
from tests.server.clock import Clock
from tests.server.dispatch.desk import dispatching
from tests.server.dispatch.test_estimator import timed
from tests.server.jobs import make_job


def test_forecasts_are_corrected_by_how_they_were_off() -> None:
    calibration = Calibration()
    assert calibration.factor(3.0) == 1.0
    calibration.learn(3.0, 6.0)
    assert 1.0 < calibration.factor(3.0) < 1.2  # One is no habit.
    for _ in range(200):
        calibration.learn(3.0, 6.0)
    assert calibration.factor(2.5) == pytest.approx(2.0, rel=0.01)
    assert calibration.factor(0.5) == 1.0
    for seconds, real in ((0.0, 1.0), (1.0, 0.0), (1e-300, 1e300), (math.inf, 1.0)):
        calibration.learn(seconds, real)
    assert all(math.isfinite(calibration.factor(s)) for s in (0.0, 1e-300, 1.0, 1e300))


def test_what_expires_is_learnt_from_too() -> None:
    calibration = Calibration()
    for _ in range(200):
        calibration.learn(3.0, 3.0)
    calibration.expired(3.0, had=2.0)  # Its deadline was nearer: it says nothing of the forecast.
    assert calibration.factor(3.0) == pytest.approx(1.0)
    for _ in range(200):
        calibration.expired(3.0, had=6.0)
    assert calibration.factor(3.0) > 2.0


async def test_a_job_that_expires_lets_its_like_be_expected_later(clock: Clock) -> None:
    async with dispatching(timed(), max_resident_samples=2) as (dispatcher, engine):
        before = dispatcher.estimate(make_job(steps=8))
        assert before is not None
        deadline = time.monotonic() + 2 * before.total
        late = dispatcher.submit(make_job("late", steps=8, deadline=deadline))
        clock.skip(3 * before.total)
        with pytest.raises(DeadlineExceeded):
            await late.result()
        engine.advance()  # It lets go.
        after = dispatcher.estimate(make_job(steps=8))
        assert after is not None
        assert after.total / after.simulated > before.total / before.simulated


def test_what_keeps_all_jobs_of_a_length_out_is_forgotten() -> None:
    calibration = Calibration()

    def learn(forecast: float, real: float) -> None:
        for _ in range(200):
            calibration.learn(forecast, real)

    def refuse(times: int) -> None:
        for _ in range(times):
            calibration.rejected(3.0)

    learn(3.0, 8.0)
    learn(30.0, 60.0)
    high = calibration.factor(3.0)
    refuse(REJECTIONS - 1)
    assert calibration.factor(3.0) == high
    calibration.learn(3.0, 8.0)  # Some are let in: it is no dead end.
    refuse(REJECTIONS - 1)
    assert calibration.factor(3.0) == pytest.approx(high, rel=0.01)
    refuse(1)
    assert calibration.factor(3.0) == pytest.approx(math.sqrt(high), rel=0.01)
    refuse(10 * REJECTIONS)
    assert calibration.factor(3.0) == pytest.approx(1.0, abs=0.01)
    assert calibration.factor(30.0) == pytest.approx(2.0, rel=0.01)
    # What makes forecasts shorter keeps nobody out.
    learn(3.0, 1.5)
    refuse(10 * REJECTIONS)
    assert calibration.factor(3.0) == pytest.approx(0.5, rel=0.02)


async def test_company_does_not_keep_all_jobs_of_a_length_out_for_good(clock: Clock) -> None:
    async with dispatching(timed(), max_resident_samples=2) as (dispatcher, engine):
        for index in range(70):  # Somebody else had the machine, and all took thrice as long.
            slow = dispatcher.submit(make_job(str(index), steps=8))
            clock.skip(3 * 8.5)
            engine.advance(8)
            await slow.result()
        dispatcher.submit(make_job("company", steps=1000))
        estimate = dispatcher.estimate(make_job(steps=8))
        assert estimate is not None
        deadline = 1.1 * estimate.simulated
        refused = 0
        while refused <= 5 * REJECTIONS:
            try:
                dispatcher.submit(make_job(steps=8, deadline=time.monotonic() + deadline))
                break
            except DeadlineExceeded:
                refused += 1
        assert REJECTIONS <= refused <= 5 * REJECTIONS


async def test_estimates_learn_from_what_came_true() -> None:
    async with dispatching(timed()) as (dispatcher, engine):
        # The fake engine needs no time, and so is far faster than it was measured.
        for index in range(20):
            accepted = dispatcher.submit(make_job(str(index), steps=4))
            engine.advance(4)
            await accepted.result()
        estimate = dispatcher.estimate(make_job(steps=4))
    assert estimate is not None
    assert estimate.simulated == pytest.approx(4.5)
    assert estimate.total < 3.0
