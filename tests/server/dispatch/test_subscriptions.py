"""The events that a job's subscriptions receive, with fast, slow and many readers."""

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
from tests.server.dispatch.harness import dispatching, settle
from tests.server.jobs import make_job


async def remaining_events(subscription: Subscription) -> list[JobEvent]:
    return [event async for event in subscription]


def summary(events: list[JobEvent]) -> list[object]:
    """Progress as (image, step), images as their index, other events unchanged."""
    items: list[object] = []
    for event in events:
        match event:
            case SampleProgress():
                items.append((event.image_index, event.step))
            case ImageDone(index):
                items.append(index)
            case _:
                items.append(event)
    return items


async def next_events(subscription: Subscription, count: int = 1) -> list[JobEvent]:
    return [await anext(subscription) for _ in range(count)]


async def test_a_fast_reader_gets_every_event() -> None:
    async with dispatching(max_resident_samples=1) as (dispatcher, engine):
        dispatcher.submit(make_job("first"))
        dispatcher.submit(make_job("second", steps=1))
        subscription = dispatcher.submit(make_job("mine", steps=2)).subscribe()
        assert await next_events(subscription) == [Queued(1)]
        engine.finish("first")
        assert await next_events(subscription) == [Queued(0)]
        engine.finish("second")
        await settle()
        engine.advance()
        assert summary(await next_events(subscription, 2)) == [Started(), (0, 1)]
        engine.advance()
        assert summary(await remaining_events(subscription)) == [(0, 2), 0]


async def test_a_reader_of_images_waits_through_everything_else() -> None:
    async with dispatching(max_resident_samples=1) as (dispatcher, engine):
        dispatcher.submit(make_job("first"))
        active = dispatcher.submit(make_job("mine", steps=2, preview_every=1))
        subscription = active.subscribe(images_only=True)
        reading = asyncio.create_task(next_events(subscription))
        engine.finish("first")
        await settle()
        assert active.position is None  # It had been in the queue.
        assert not subscription._unread
        engine.advance()
        assert [type(event) for event in await reading] == [PreviewReady]
        engine.advance()
        rest = await remaining_events(subscription)
        assert rest == [ImageDone(0)]


async def test_a_slow_reader_gets_the_latest_and_every_image() -> None:
    async with dispatching() as (dispatcher, engine):
        active = dispatcher.submit(make_job(steps=500, image_count=3, preview_every=1))
        subscription = active.subscribe()
        engine.advance(499)
        await settle()
        events = summary(await next_events(subscription, 7))
        assert events[0] == Started()
        assert [entry for entry in events if isinstance(entry, tuple)] == [
            (0, 499),
            (1, 499),
            (2, 499),
        ]
        previews = [event for event in events if isinstance(event, PreviewReady)]
        assert [(e.image_index, e.step) for e in previews] == [(0, 499), (1, 499), (2, 499)]
        engine.advance()
        rest = summary(await remaining_events(subscription))
        assert [entry for entry in rest if isinstance(entry, int)] == [0, 1, 2]


async def test_unread_events_are_bounded() -> None:
    async with dispatching() as (dispatcher, engine):
        subscription = dispatcher.submit(
            make_job(steps=10_000, image_count=2, preview_every=1)
        ).subscribe()
        for _ in range(20):
            engine.advance(100)
            await settle()
            # Started, and the progress and a preview of each image.
            assert len(subscription._unread) == 5


async def test_no_image_starves_another_of_its_progress() -> None:
    async with dispatching() as (dispatcher, engine):
        subscription = dispatcher.submit(make_job(steps=100, image_count=4)).subscribe()
        engine.advance()
        await next_events(subscription)
        seen = set()
        for _ in range(4):
            (event,) = await next_events(subscription)
            assert isinstance(event, SampleProgress)
            seen.add(event.image_index)
            engine.advance()
            await settle()
        assert seen == {0, 1, 2, 3}


async def test_a_crash_starts_the_progress_over_and_keeps_the_images() -> None:
    submitted: asyncio.Queue[Job] = asyncio.Queue()
    async with dispatching(FakeEngine(on_submit=submitted.put_nowait)) as (dispatcher, engine):
        subscription = dispatcher.submit(make_job("job", steps=4, image_count=2)).subscribe()
        await submitted.get()
        engine.advance(3)
        engine.deliver("job", 0)
        engine.die()
        assert (await submitted.get()).image_indices == [1]
        assert summary(await next_events(subscription, 2)) == [0, Restarted(1)]
        engine.advance(4)
        events = summary(
            [e for e in await remaining_events(subscription) if not isinstance(e, Queued)]
        )
        assert events == [Started(), (1, 4), 1]


async def test_a_poison_job_that_fails_gets_no_second_restarted_event() -> None:
    submitted: asyncio.Queue[Job] = asyncio.Queue()
    async with dispatching(FakeEngine(on_submit=submitted.put_nowait)) as (dispatcher, engine):
        active = dispatcher.submit(make_job())
        subscription = active.subscribe()
        for _ in range(2):
            await submitted.get()
            engine.advance()
            engine.die()
        restarts = [e for e in await remaining_events(subscription) if isinstance(e, Restarted)]
        assert restarts == [Restarted(1)]
        with pytest.raises(GenerationFailed, match="crashed twice"):
            await active.result()


async def test_a_late_subscription_gets_the_state_and_every_image() -> None:
    async with dispatching() as (dispatcher, engine):
        active = dispatcher.submit(make_job("job", steps=4, image_count=2))
        engine.advance(2)
        engine.deliver("job", 0)
        await settle()
        late = active.subscribe()
        assert summary(await next_events(late, 2)) == [Started(), 0]
        engine.advance(2)
        assert summary(await remaining_events(late))[-1] == 1


async def test_a_subscription_after_the_end_gets_the_images() -> None:
    async with dispatching() as (dispatcher, engine):
        active = dispatcher.submit(make_job(image_count=2))
        engine.advance(4)
        await active.result()
        assert summary(await remaining_events(active.subscribe())) == [Started(), 0, 1]


async def test_the_job_ends_with_its_last_subscription() -> None:
    async with dispatching() as (dispatcher, engine):
        active = dispatcher.submit(make_job())
        first, second = active.subscribe(), active.subscribe()
        with first:
            pass
        assert not active.ended
        with second:
            pass
        assert active.ended
        with pytest.raises(JobCancelled):
            await active.result()
        assert dispatcher.counts.by_end == {JobOutcome.CANCELLED: 1}
        engine.advance(0)


async def test_a_job_outlives_its_subscriptions_for_the_reattach_grace() -> None:
    async with dispatching() as (dispatcher, _):
        active = dispatcher.submit(make_job())
        active.reattach_grace = 0.02
        with active.subscribe():
            pass
        assert not active.ended
        with pytest.raises(JobCancelled):
            await active.result()


async def test_a_subscription_within_the_reattach_grace_keeps_the_job() -> None:
    async with dispatching() as (dispatcher, engine):
        active = dispatcher.submit(make_job())
        active.reattach_grace = 60.0
        with active.subscribe():
            pass
        assert active._grace_timer is not None
        with active.subscribe() as subscription:
            assert active._grace_timer is None
            engine.advance(4)
            assert summary(await remaining_events(subscription))[-1] == 0
        assert isinstance(await active.result(), Finished)


async def test_a_stalled_subscription_releases_the_images(clock: Clock) -> None:
    async with dispatching() as (dispatcher, engine):
        active = dispatcher.submit(make_job(image_count=2))
        job = weakref.ref(active)
        with active.subscribe() as subscription:
            engine.advance(4)
            await active.result()
            del active
            clock.skip(STALL_SECONDS)
            await settle()
            gc.collect()
            assert job() is None
            # The events are still there; the images are not.
            assert summary(await remaining_events(subscription))[-2:] == [0, 1]
            with pytest.raises(UnknownRequest):
                subscription.image(0)


async def test_a_slow_subscription_keeps_the_images(clock: Clock) -> None:
    async with dispatching() as (dispatcher, engine):
        active = dispatcher.submit(make_job())
        with active.subscribe() as subscription:
            engine.advance(4)
            await active.result()
            for _ in range(10):
                assert subscription.image(0).data
                clock.skip(STALL_SECONDS / 2)
                await settle()


async def test_cancelling_a_job_ends_its_subscriptions() -> None:
    async with dispatching() as (dispatcher, _):
        active = dispatcher.submit(make_job("job"))
        with active.subscribe() as subscription:
            dispatcher.cancel("job")
            assert await remaining_events(subscription) == []
        with pytest.raises(JobCancelled, match="was cancelled"):
            await active.result()
