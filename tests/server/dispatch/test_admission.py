import time

import pytest

from darkroom_server.backends.fake import FakeEngine
from darkroom_server.core.errors import (
    DeadlineExceeded,
    NotReady,
    QueueFull,
    Reason,
    StartupError,
    TooLarge,
    UnknownModel,
)
from tests.server.dispatch.harness import dispatching, settle
from tests.server.jobs import make_job


async def test_a_job_runs_to_its_end() -> None:
    async with dispatching() as (dispatcher, engine):
        active = dispatcher.submit(make_job(image_count=2, seed=2**63 - 1))
        engine.advance(4)
        finished = await active.result()
        assert [image.seed for image in finished.images] == [2**63 - 1, 0]
        assert dispatcher.running_jobs == 0


async def test_nothing_is_accepted_while_loading() -> None:
    async with dispatching(ready=False) as (dispatcher, engine):
        assert not dispatcher.ready
        assert dispatcher.availability.models == {"demo": None}
        with pytest.raises(NotReady) as caught:
            dispatcher.submit(make_job())
        assert caught.value.reason is Reason.MODEL_LOADING
        assert caught.value.retry_after
        engine.become_ready()
        await dispatcher.loaded()
        assert dispatcher.ready
        assert dispatcher.availability.model("demo").revision == "fake"


async def test_unknown_models_are_rejected_even_while_loading() -> None:
    async with dispatching(ready=False) as (dispatcher, _):
        with pytest.raises(UnknownModel, match="this server holds demo"):
            dispatcher.submit(make_job(model="other"))


async def test_an_engine_that_cannot_load_says_why() -> None:
    engine = FakeEngine(startup_error="no such folder")
    async with dispatching(engine, ready=False) as (dispatcher, _):
        with pytest.raises(StartupError, match="no such folder"):
            await dispatcher.loaded()


async def test_a_full_queue_rejects_and_says_when_to_try_again() -> None:
    async with dispatching(max_queued_jobs=1) as (dispatcher, engine):
        first = dispatcher.submit(make_job("a", image_count=2))
        dispatcher.submit(make_job("b"))
        assert (dispatcher.running_jobs, dispatcher.queued_jobs) == (1, 1)
        with pytest.raises(QueueFull) as caught:
            dispatcher.submit(make_job("c"))
        assert caught.value.retry_after == 1.0  # A guess: no job has finished yet.
        engine.finish("a")
        await first.result()
        dispatcher.submit(make_job("c"))
        assert dispatcher.counts.accepted == 3


async def test_without_a_queue_jobs_are_accepted_while_the_engine_has_room() -> None:
    async with dispatching(max_queued_jobs=0, max_resident_samples=1) as (dispatcher, _):
        dispatcher.submit(make_job("a"))
        with pytest.raises(QueueFull):
            dispatcher.submit(make_job("b"))


async def test_a_job_whose_deadline_has_passed_is_not_accepted() -> None:
    async with dispatching() as (dispatcher, engine):
        with pytest.raises(DeadlineExceeded):
            dispatcher.submit(make_job(deadline=time.monotonic() - 1))
        assert dispatcher.counts.accepted == 0
        assert not engine.jobs


async def test_an_image_that_never_fits_is_rejected_with_numbers() -> None:
    async with dispatching() as (dispatcher, _):
        with pytest.raises(TooLarge, match="ask for a smaller one") as caught:
            dispatcher.submit(make_job(width=2048, height=2048))
        assert caught.value.retry_after is None
        needed, available = (int(caught.value.metadata[k]) for k in caught.value.metadata)
        assert needed > available > 0


async def test_ids_are_unique_among_the_live_jobs() -> None:
    async with dispatching() as (dispatcher, engine):
        first = dispatcher.submit(make_job("a"))
        with first.subscribe():
            second = dispatcher.submit(make_job("a"))
        # Cancelled, but the engine has not removed it.
        assert first.ended
        third = dispatcher.submit(make_job("a"))
        assert len({"a", second.job.id, third.job.id}) == 3
        engine.advance(0)
        await settle()
        assert dispatcher.submit(make_job("a")).job.id == "a"


async def test_short_jobs_go_to_the_engine_first() -> None:
    async with dispatching(max_resident_samples=1) as (dispatcher, engine):
        dispatcher.submit(make_job("first"))
        dispatcher.submit(make_job("long", steps=500))
        dispatcher.submit(make_job("short", steps=5))
        engine.finish("first")
        await settle()
        assert [job.id for job in engine.jobs] == ["short"]


async def test_the_engine_gets_no_job_while_it_holds_the_most_samples() -> None:
    async with dispatching(max_resident_samples=3) as (dispatcher, engine):
        for id in "abcd":
            dispatcher.submit(make_job(id, image_count=2))
        # The engine gets a job while it holds fewer than three samples.
        assert len(engine.jobs) == 2
        assert dispatcher.queued_jobs == 2
