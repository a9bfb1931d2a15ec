"""What a job's waiters are told, however slow they are and however many."""

import asyncio
import gc
import weakref

import pytest

from darkroom_server.backends.fake import FakeEngine
from darkroom_server.core.errors import GenerationFailed, JobCancelled, UnknownRequest
from darkroom_server.core.events import PreviewReady, SampleProgress
from darkroom_server.core.job import Job
from darkroom_server.dispatch import (
    Finished,
    ImageDone,
    JobEvent,
    JobOutcome,
    Queued,
    Restarted,
    Started,
    Subscription,
)
from darkroom_server.dispatch.jobs.subscription import STALL_SECONDS
from tests.server.clock import Clock
from tests.server.dispatch.desk import dispatching, settle
from tests.server.jobs import make_job


async def everything(waiter: Subscription) -> list[JobEvent]:
    return [event async for event in waiter]


def brief(events: list[JobEvent]) -> list[object]:
    """Progress as (image, step), images as their index, the rest as it is."""
    told: list[object] = []
    for event in events:
        match event:
            case SampleProgress():
                told.append((event.image_index, event.step))
            case ImageDone(index):
                told.append(index)
            case _:
                told.append(event)
    return told


async def next_of(waiter: Subscription, count: int = 1) -> list[JobEvent]:
    return [await anext(waiter) for _ in range(count)]


async def test_a_reader_that_keeps_up_is_told_everything() -> None:
    async with dispatching(max_resident_samples=1) as (dispatcher, engine):
        dispatcher.submit(make_job("first"))
        dispatcher.submit(make_job("second", steps=1))
        waiter = dispatcher.submit(make_job("mine", steps=2)).subscribe()
        assert await next_of(waiter) == [Queued(1)]
        engine.finish("first")
        assert await next_of(waiter) == [Queued(0)]
        engine.finish("second")
        await settle()
        engine.advance()
        assert brief(await next_of(waiter, 2)) == [Started(), (0, 1)]
        engine.advance()
        assert brief(await everything(waiter)) == [(0, 2), 0]


async def test_a_slow_reader_gets_the_latest_and_every_image() -> None:
    async with dispatching() as (dispatcher, engine):
        accepted = dispatcher.submit(make_job(steps=500, image_count=3, preview_every=1))
        waiter = accepted.subscribe()
        engine.advance(499)
        await settle()
        told = brief(await next_of(waiter, 7))
        assert told[0] == Started()
        assert [entry for entry in told if isinstance(entry, tuple)] == [
            (0, 499),
            (1, 499),
            (2, 499),
        ]
        previews = [e for e in told if isinstance(e, PreviewReady)]
        assert [(e.image_index, e.step) for e in previews] == [(0, 499), (1, 499), (2, 499)]
        engine.advance()
        rest = brief(await everything(waiter))
        assert [entry for entry in rest if isinstance(entry, int)] == [0, 1, 2]


async def test_what_is_not_read_does_not_grow() -> None:
    async with dispatching() as (dispatcher, engine):
        waiter = dispatcher.submit(
            make_job(steps=10_000, image_count=2, preview_every=1)
        ).subscribe()
        for _ in range(20):
            engine.advance(100)
            await settle()
            # Started, and progress and a preview of each image.
            assert len(waiter._unread) == 5


async def test_no_image_starves_another_of_its_progress() -> None:
    async with dispatching() as (dispatcher, engine):
        waiter = dispatcher.submit(make_job(steps=100, image_count=4)).subscribe()
        engine.advance()
        await next_of(waiter)
        seen = set()
        for _ in range(4):
            (event,) = await next_of(waiter)
            assert isinstance(event, SampleProgress)
            seen.add(event.image_index)
            engine.advance()
            await settle()
        assert seen == {0, 1, 2, 3}


async def test_a_crash_starts_the_progress_over_and_keeps_the_images() -> None:
    given: asyncio.Queue[Job] = asyncio.Queue()
    async with dispatching(FakeEngine(on_submit=given.put_nowait)) as (dispatcher, engine):
        waiter = dispatcher.submit(make_job("job", steps=4, image_count=2)).subscribe()
        await given.get()
        engine.advance(3)
        engine.deliver("job", 0)
        engine.die()
        assert (await given.get()).image_indices == [1]
        assert brief(await next_of(waiter, 2)) == [0, Restarted(1)]
        engine.advance(4)
        told = brief([e for e in await everything(waiter) if not isinstance(e, Queued)])
        assert told == [Started(), (1, 4), 1]


async def test_a_job_that_is_given_up_is_not_told_to_be_run_again() -> None:
    given: asyncio.Queue[Job] = asyncio.Queue()
    async with dispatching(FakeEngine(on_submit=given.put_nowait)) as (dispatcher, engine):
        accepted = dispatcher.submit(make_job())
        waiter = accepted.subscribe()
        for _ in range(2):
            await given.get()
            engine.advance()
            engine.die()
        restarts = [e for e in await everything(waiter) if isinstance(e, Restarted)]
        assert restarts == [Restarted(1)]
        with pytest.raises(GenerationFailed, match="crashed twice"):
            await accepted.result()


async def test_one_that_comes_later_is_told_where_it_is_and_every_image() -> None:
    async with dispatching() as (dispatcher, engine):
        accepted = dispatcher.submit(make_job("job", steps=4, image_count=2))
        engine.advance(2)
        engine.deliver("job", 0)
        await settle()
        late = accepted.subscribe()
        assert brief(await next_of(late, 2)) == [Started(), 0]
        engine.advance(2)
        assert brief(await everything(late))[-1] == 1


async def test_one_that_comes_after_the_end_is_told_of_the_images() -> None:
    async with dispatching() as (dispatcher, engine):
        accepted = dispatcher.submit(make_job(image_count=2))
        engine.advance(4)
        await accepted.result()
        assert brief(await everything(accepted.subscribe())) == [Started(), 0, 1]


async def test_the_job_ends_with_its_last_waiter() -> None:
    async with dispatching() as (dispatcher, engine):
        accepted = dispatcher.submit(make_job())
        first, second = accepted.subscribe(), accepted.subscribe()
        with first:
            pass
        assert not accepted.ended
        with second:
            pass
        assert accepted.ended
        with pytest.raises(JobCancelled):
            await accepted.result()
        assert dispatcher.counts.by_end == {JobOutcome.CANCELLED: 1}
        engine.advance(0)


async def test_a_job_may_outlive_its_waiters_for_a_while() -> None:
    async with dispatching() as (dispatcher, _):
        accepted = dispatcher.submit(make_job())
        accepted.reattach_grace = 0.02
        with accepted.subscribe():
            pass
        assert not accepted.ended
        with pytest.raises(JobCancelled):
            await accepted.result()


async def test_a_waiter_that_comes_back_in_time_keeps_the_job() -> None:
    async with dispatching() as (dispatcher, engine):
        accepted = dispatcher.submit(make_job())
        accepted.reattach_grace = 60.0
        with accepted.subscribe():
            pass
        assert accepted._grace_timer is not None
        with accepted.subscribe() as waiter:
            assert accepted._grace_timer is None
            engine.advance(4)
            assert brief(await everything(waiter))[-1] == 0
        assert isinstance(await accepted.result(), Finished)


async def test_one_that_takes_nothing_lets_go_of_the_images(clock: Clock) -> None:
    async with dispatching() as (dispatcher, engine):
        accepted = dispatcher.submit(make_job(image_count=2))
        job = weakref.ref(accepted)
        with accepted.subscribe() as waiter:
            engine.advance(4)
            await accepted.result()
            del accepted
            clock.skip(STALL_SECONDS)
            await settle()
            gc.collect()
            assert job() is None
            # The events are still there, the images are not.
            assert brief(await everything(waiter))[-2:] == [0, 1]
            with pytest.raises(UnknownRequest):
                waiter.image(0)


async def test_one_that_is_slow_keeps_the_images(clock: Clock) -> None:
    async with dispatching() as (dispatcher, engine):
        accepted = dispatcher.submit(make_job())
        with accepted.subscribe() as waiter:
            engine.advance(4)
            await accepted.result()
            for _ in range(10):
                assert waiter.image(0).data
                clock.skip(STALL_SECONDS / 2)
                await settle()


async def test_a_cancelled_job_tells_those_who_wait() -> None:
    async with dispatching() as (dispatcher, _):
        accepted = dispatcher.submit(make_job("job"))
        with accepted.subscribe() as waiter:
            dispatcher.cancel("job")
            assert await everything(waiter) == []
        with pytest.raises(JobCancelled, match="was cancelled"):
            await accepted.result()
