import asyncio
import time

import pytest

from darkroom_server.backends.fake import FakeEngine
from darkroom_server.core.errors import (
    DeadlineExceeded,
    Failure,
    GenerationFailed,
    NotReady,
    Reason,
)
from darkroom_server.core.events import JobFinished, StageSeconds
from darkroom_server.core.job import DEADLINE_SLACK_SECONDS
from darkroom_server.dispatch import ActiveJob, JobOutcome
from tests.server.clock import Clock
from tests.server.dispatch.harness import dispatching, settle
from tests.server.jobs import make_job


def wait_for_result(active: ActiveJob) -> "asyncio.Task[object]":
    async def wait() -> object:
        with active.subscribe():
            return await active.result()

    return asyncio.create_task(wait())


async def test_a_queued_job_whose_deadline_passes_never_reaches_the_engine(clock: Clock) -> None:
    async with dispatching(max_resident_samples=1) as (dispatcher, engine):
        dispatcher.submit(make_job("running"))
        late = dispatcher.submit(make_job("late", deadline=time.monotonic() + 300))
        clock.skip(300)
        with pytest.raises(DeadlineExceeded, match="before it was begun"):
            await late.result()
        assert dispatcher.queued_jobs == 0
        assert dispatcher.counts.by_end[JobOutcome.EXPIRED] == 1
        engine.finish("running")
        await settle()
        assert not engine.jobs


async def test_a_running_job_whose_deadline_passes_is_removed_from_the_engine(clock: Clock) -> None:
    async with dispatching() as (dispatcher, engine):
        late = dispatcher.submit(make_job("late", deadline=time.monotonic() + 300))
        dispatcher.submit(make_job("other", deadline=time.monotonic() + 900))
        clock.skip(300)
        with pytest.raises(DeadlineExceeded, match="before it was finished"):
            await late.result()
        engine.advance()
        await settle()
        assert [job.id for job in engine.jobs] == ["other"]
        assert dispatcher.running_jobs == 1


@pytest.mark.parametrize("place", ["engine", "queue"])
async def test_cancelling_the_only_subscriber_cancels_its_job(place: str) -> None:
    async with dispatching(max_resident_samples=1) as (dispatcher, engine):
        if place == "queue":
            dispatcher.submit(make_job("other"))
        task = wait_for_result(dispatcher.submit(make_job("mine")))
        await settle()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        engine.advance(0)
        await settle()
        assert "mine" not in [job.id for job in engine.jobs]
        assert dispatcher.queued_jobs == 0
        assert dispatcher.counts.by_end == {JobOutcome.CANCELLED: 1}


async def test_a_cancelled_job_takes_its_place_until_the_engine_removes_it() -> None:
    async with dispatching(max_resident_samples=1) as (dispatcher, engine):
        dispatcher.submit(make_job("a"))
        dispatcher.submit(make_job("b"))
        dispatcher.cancel("a")
        assert [job.id for job in engine.jobs] == ["a"]
        engine.advance(0)
        await settle()
        assert [job.id for job in engine.jobs] == ["b"]


async def test_a_job_that_fails_in_the_engine_fails_for_its_caller_alone() -> None:
    async with dispatching() as (dispatcher, engine):
        bad, good = dispatcher.submit(make_job("bad")), dispatcher.submit(make_job("good"))
        engine.fail("bad", Failure(Reason.NON_FINITE, "not a number", {"step": "3"}))
        with pytest.raises(GenerationFailed, match="not a number") as caught:
            await bad.result()
        assert (caught.value.reason, caught.value.metadata) == (Reason.NON_FINITE, {"step": "3"})
        engine.finish("good")
        assert (await good.result()).images


async def test_a_job_that_lost_an_image_is_not_finished() -> None:
    async with dispatching() as (dispatcher, engine):
        active = dispatcher.submit(make_job())
        engine._emit(JobFinished("job", StageSeconds()))
        with pytest.raises(GenerationFailed, match="lost an image"):
            await active.result()


async def test_every_job_fails_if_no_engine_restarts() -> None:
    async with dispatching(max_resident_samples=1, max_restarts=0) as (dispatcher, engine):
        jobs = [dispatcher.submit(make_job(id)) for id in "abc"]
        engine.die()
        assert "the fake engine was made to die" in await dispatcher.availability.failed()
        for job in jobs:
            with pytest.raises(GenerationFailed) as caught:
                await job.result()
            assert caught.value.reason is Reason.ENGINE_FAILED
        assert not dispatcher.ready
        with pytest.raises(NotReady) as rejected:
            dispatcher.submit(make_job("d"))
        assert rejected.value.reason is Reason.ENGINE_FAILED


async def test_draining_lets_accepted_jobs_finish() -> None:
    async with dispatching(max_resident_samples=1) as (dispatcher, engine):
        running, queued = dispatcher.submit(make_job("a")), dispatcher.submit(make_job("b"))
        drain = asyncio.create_task(dispatcher.drain(60))
        await settle()
        with pytest.raises(NotReady) as caught:
            dispatcher.submit(make_job("c"))
        assert caught.value.reason is Reason.DRAINING
        engine.finish("a")
        await running.result()
        assert not drain.done()
        engine.finish("b")
        await queued.result()
        await drain
        assert dispatcher.counts.by_end == {JobOutcome.FINISHED: 2}


async def test_draining_fails_jobs_that_take_too_long() -> None:
    async with dispatching(max_resident_samples=1) as (dispatcher, engine):
        jobs = [dispatcher.submit(make_job(id)) for id in "ab"]
        await dispatcher.drain(0.01)
        for job in jobs:
            with pytest.raises(NotReady) as caught:
                await job.result()
            assert caught.value.reason is Reason.DRAINING
        assert engine._cancelled == {"a"}


async def test_events_of_a_job_that_has_ended_are_ignored() -> None:
    async with dispatching() as (dispatcher, engine):
        dispatcher.submit(make_job("a"))
        dispatcher.cancel("a")
        dispatcher.cancel("a")
        engine.finish("a")  # It was in its last step when it was cancelled.
        await settle()
        engine._emit(JobFinished("a", StageSeconds()))
        engine._emit(JobFinished("never", StageSeconds()))
        await settle()
        assert dispatcher.counts.by_end == {JobOutcome.CANCELLED: 1}
        assert dispatcher.running_jobs == 0


def test_the_engine_may_outlive_the_event_loop() -> None:
    async def live() -> FakeEngine:
        async with dispatching() as (_, engine):
            return engine

    asyncio.run(live()).become_ready()


async def test_a_subscription_that_closes_at_the_deadline_counts_as_expired(clock: Clock) -> None:
    async with dispatching() as (dispatcher, _):
        for id, passes in (("a", 300 - DEADLINE_SLACK_SECONDS), ("b", 0)):
            with dispatcher.submit(make_job(id, deadline=time.monotonic() + 300)).subscribe():
                clock.skip(passes)
        assert dispatcher.counts.by_end == {JobOutcome.EXPIRED: 1, JobOutcome.CANCELLED: 1}
