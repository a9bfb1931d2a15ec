"""The backlog follows the work: new jobs, time, cancels, and the end."""

from dataclasses import replace

import pytest

from darkroom_server.backends.fake import FakeEngine
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.dispatch.lifecycle import REFRESH_SECONDS
from tests.server.clock import Clock
from tests.server.dispatch.harness import SPEED, dispatching, settle, timed_engine
from tests.server.jobs import make_job


@pytest.fixture(autouse=True)
def no_time_passes(clock: Clock) -> None:
    clock.stop()


async def test_a_job_adds_its_time_and_time_takes_it_away(clock: Clock) -> None:
    async with dispatching(timed_engine(), max_resident_samples=1) as (dispatcher, _):
        assert dispatcher.backlog.seconds("demo") == 0.0
        dispatcher.submit(make_job("first", steps=4))
        assert dispatcher.backlog.seconds("demo") == pytest.approx(4.5)
        dispatcher.submit(make_job("second", steps=4))
        two = dispatcher.backlog.seconds("demo")
        assert two == pytest.approx(0.5 + 2 * 4.5)
        clock.skip(REFRESH_SECONDS / 2)
        assert dispatcher.backlog.seconds("demo") == pytest.approx(two - REFRESH_SECONDS / 2)


async def test_an_estimate_without_a_job_adds_nothing() -> None:
    async with dispatching(timed_engine()) as (dispatcher, _):
        assert dispatcher.estimate(make_job(steps=4)) is not None
        assert dispatcher.backlog.seconds("demo") == 0.0


async def test_what_is_cancelled_leaves_the_backlog_at_the_next_refresh(clock: Clock) -> None:
    async with dispatching(timed_engine(), max_resident_samples=1) as (dispatcher, engine):
        dispatcher.submit(make_job("first", steps=4))
        dispatcher.submit(make_job("second", steps=400))
        dispatcher.cancel("second")
        assert dispatcher.backlog.seconds("demo") > 400.0
        clock.skip(REFRESH_SECONDS)
        await settle()
        # "first" has not begun, and its first step boundary is half a batch away.
        assert dispatcher.backlog.seconds("demo") == pytest.approx(5.0)
        engine.advance(4)
        await settle()
        assert dispatcher.backlog.seconds("demo") == 0.0


async def test_a_job_that_takes_longer_than_estimated_stays_in_the_backlog(clock: Clock) -> None:
    async with dispatching(timed_engine()) as (dispatcher, _):
        dispatcher.submit(make_job("late", steps=4))
        clock.skip(60.0)
        assert dispatcher.backlog.seconds("demo") == 0.0
        await settle()
        assert dispatcher.backlog.seconds("demo") == pytest.approx(5.0)


async def test_no_timer_runs_on_an_idle_server(clock: Clock) -> None:
    async with dispatching(timed_engine()) as (dispatcher, engine):
        dispatcher.submit(make_job("only", steps=4))
        engine.advance(4)
        await settle()
        dispatcher.backlog.finish_at = marker = {"demo": 0.0}
        clock.skip(10 * REFRESH_SECONDS)
        await settle()
        assert dispatcher.backlog.finish_at is marker


async def test_models_have_their_own_backlog() -> None:
    models = [replace(fake_model(id), speed=SPEED) for id in ("one", "other")]
    async with dispatching(FakeEngine(models)) as (dispatcher, _):
        dispatcher.submit(make_job("short", model="one", steps=2))
        assert set(dispatcher.backlog.finish_at) == {"one"}
        dispatcher.submit(make_job("long", model="other", steps=40))
        assert dispatcher.backlog.seconds("other") > dispatcher.backlog.seconds("one") > 0.0
