"""Deadlines that cannot be met are rejected; full queues say when to try again."""

import time
from dataclasses import replace
from typing import Any

import pytest

from darkroom_server.backends.fake import FakeEngine
from darkroom_server.backends.fake_model import fake_image_model
from darkroom_server.core.caller import Caller
from darkroom_server.core.errors import (
    DeadlineExceeded,
    DeadlineUnreachable,
    QueueFull,
    QuotaExceeded,
    Reason,
)
from darkroom_server.core.events import BatchDone
from darkroom_server.core.inputs import Control, InputImage, Lora
from darkroom_server.dispatch import EstimateChecked, Observer
from darkroom_server.dispatch.admission.quotas import Quotas
from darkroom_server.dispatch.jobs.job import JobState
from tests.server.clock import Clock
from tests.server.dispatch.harness import SPEED, dispatching, settle, timed_engine
from tests.server.jobs import make_job


@pytest.fixture(autouse=True)
def no_time_passes(clock: Clock) -> None:
    clock.stop()


async def test_a_job_alone_takes_its_steps_and_its_decode() -> None:
    async with dispatching(timed_engine()) as (dispatcher, _):
        estimate = dispatcher.estimate(make_job(steps=4))
        assert estimate is not None
        assert estimate.queue_wait == 0.0
        assert estimate.run_time == estimate.total == pytest.approx(4.5)
        assert estimate.finish_at == pytest.approx(time.monotonic() + 4.5)
        assert dispatcher.counts.accepted == 0


async def test_a_controlnet_makes_the_steps_longer_that_it_changes() -> None:
    model = replace(fake_image_model(), speed=SPEED)
    picture = InputImage(digest="sha256:", width=64, height=64, channels=3, pixels=b"")
    async with dispatching(FakeEngine([model])) as (dispatcher, _):
        for start, scale, seconds in ((0.0, 1.0, 6.5), (0.5, 1.0, 5.5), (0.0, 0.0, 4.5)):
            control = Control(id="pose", image=picture, scale=scale, start=start)
            estimate = dispatcher.estimate(make_job(steps=4, controls=(control,)))
            assert estimate is not None
            assert estimate.total == pytest.approx(seconds)


async def test_adapters_make_a_job_longer_once_a_batch_has_shown_it() -> None:
    model = replace(fake_image_model(), speed=SPEED)
    job = make_job(steps=4, loras=(Lora(id="outline"),))
    engine = FakeEngine([model])
    async with dispatching(engine) as (dispatcher, _):
        times = []
        for each in (job, make_job(steps=4)):
            estimate = dispatcher.estimate(each)
            assert estimate is not None
            times.append(estimate.total)
        assert times == pytest.approx([4.5, 4.5])
        engine._emit(BatchDone(model="demo", width=64, height=64, rows=2, seconds=1.5, adapters=1))
        await settle()
        for each, seconds in (
            (job, 6.5),
            (make_job(steps=4), 4.5),
            (replace(job, loras=(Lora(id="outline", scale=0.0),)), 4.5),
        ):
            estimate = dispatcher.estimate(each)
            assert estimate is not None
            assert estimate.total == pytest.approx(seconds)


async def test_other_jobs_and_a_queue_take_longer() -> None:
    async with dispatching(timed_engine(), max_resident_samples=1) as (dispatcher, _):
        dispatcher.submit(make_job("first", steps=4))
        estimate = dispatcher.estimate(make_job("second", steps=4))
        assert estimate is not None
        assert estimate.queue_wait == pytest.approx(0.5 + 4.5)
        active = dispatcher.submit(make_job("second", steps=4))
        assert active.estimate is not None
        assert active.estimate.total == pytest.approx(estimate.total)
        # The third job is shorter than the second, so it waits for the first only.
        again = dispatcher.estimate(make_job("third", steps=1))
        assert again is not None
        assert again.queue_wait == pytest.approx(5.0)


async def test_progress_shortens_the_remaining_work() -> None:
    async with dispatching(timed_engine(), max_resident_samples=1) as (dispatcher, engine):
        dispatcher.submit(make_job("first", steps=4))
        engine.advance(3)
        await settle()
        estimate = dispatcher.estimate(make_job("second", steps=4))
        assert estimate is not None
        assert estimate.queue_wait == pytest.approx(0.5 + 1.5)


async def test_an_engine_without_measurements_has_no_estimate() -> None:
    async with dispatching() as (dispatcher, _):
        assert dispatcher.estimate(make_job()) is None
        dispatcher.submit(make_job(deadline=time.monotonic() + 0.5, steps=1000))


async def test_an_unreachable_deadline_is_rejected_at_once() -> None:
    async with dispatching(timed_engine()) as (dispatcher, engine):
        with pytest.raises(DeadlineExceeded, match=r"40.50 s, 0.00 s of them") as caught:
            dispatcher.submit(make_job(steps=40, deadline=time.monotonic() + 20))
        assert caught.value.reason is Reason.DEADLINE_UNREACHABLE
        figures = {key: float(value) for key, value in caught.value.metadata.items()}
        assert figures["estimate_seconds"] == pytest.approx(40.5)
        assert figures["queue_wait_seconds"] == 0.0
        assert figures["remaining_seconds"] == pytest.approx(20)
        assert figures["needed_seconds"] == pytest.approx(40.5)
        assert "give it at least 40.50 s or ask for fewer steps" in str(caught.value)
        assert dispatcher.counts.accepted == 0
        assert not engine.jobs


async def test_a_job_alone_is_accepted_with_less_time_than_estimated() -> None:
    async with dispatching(timed_engine()) as (dispatcher, _):
        # 4.5 s are estimated, and it may be faster.
        dispatcher.submit(make_job("a", steps=4, deadline=time.monotonic() + 3.7))
        # With other jobs it may be slower than estimated: later jobs can overtake it.
        estimate = dispatcher.estimate(make_job("b", steps=4))
        assert estimate is not None
        with pytest.raises(DeadlineUnreachable) as caught:
            dispatcher.submit(
                make_job("b", steps=4, deadline=time.monotonic() + 1.49 * estimate.total)
            )
        needed = float(caught.value.metadata["needed_seconds"])
        assert needed == pytest.approx(1.5 * estimate.total, abs=0.01)
        dispatcher.submit(make_job("b", steps=4, deadline=time.monotonic() + 1.51 * estimate.total))


async def test_a_slow_stretch_rejects_no_deadline_that_can_be_met(clock: Clock) -> None:
    """For 40 steps every batch takes five times as long as before and after."""

    async def run(steps: int, slowness: float) -> None:
        accepted = dispatcher.submit(make_job("slow" if slowness > 1 else "normal", steps=steps))
        for _ in range(steps):
            engine._pass_seconds = slowness
            clock.skip(slowness)
            engine.advance()
            await settle()
        await accepted.result()

    async with dispatching(timed_engine(), max_resident_samples=9) as (dispatcher, engine):
        before = dispatcher.estimate(make_job(steps=4))
        await run(40, 1.0)
        for _ in range(4):
            await run(10, 5.0)
        after = dispatcher.estimate(make_job(steps=4))
        assert before is not None
        assert after is not None
        assert after.total > 1.5 * before.total  # The stretch was noticed.
        dispatcher.submit(make_job("company", steps=1))
        now = time.monotonic()
        dispatcher.submit(make_job("possible", steps=4, deadline=now + 2.2 * before.total))
        # The negative control: what even the fast machine cannot do is rejected at once.
        with pytest.raises(DeadlineUnreachable):
            dispatcher.submit(make_job("never", steps=4, deadline=now + 0.5 * before.total))


async def test_jobs_that_were_slow_once_reject_no_deadline_that_can_be_met(clock: Clock) -> None:
    """The batches are as fast as ever, but 15 jobs took five times as long as simulated."""
    async with dispatching(timed_engine(), max_resident_samples=9) as (dispatcher, engine):
        for index in range(30):
            accepted = dispatcher.submit(make_job(str(index), steps=4))
            clock.skip(4.5 if index < 15 else 22.5)
            engine.advance(4)
            await accepted.result()
        estimate = dispatcher.estimate(make_job(steps=4))
        assert estimate is not None
        assert estimate.simulated == pytest.approx(4.5)
        dispatcher.submit(make_job("company", steps=1))
        now = time.monotonic()
        dispatcher.submit(make_job("possible", steps=4, deadline=now + 2.2 * 4.5))
        with pytest.raises(DeadlineUnreachable):
            dispatcher.submit(make_job("never", steps=4, deadline=now + 0.5 * 4.5))


async def test_a_wrong_measurement_does_not_reject_jobs_forever() -> None:
    """At warm-up, on a busy machine, a batch took a second; now it takes almost no time."""

    async def rejections() -> int:
        for count in range(100):
            deadline = time.monotonic() + 7.0
            try:
                active = dispatcher.submit(make_job(steps=40, deadline=deadline))
            except DeadlineExceeded:
                continue
            engine.advance(40)
            await active.result()
            return count
        raise AssertionError("no job was accepted")

    async with dispatching(timed_engine()) as (dispatcher, engine):
        assert await rejections() == 3
        # A batch was recorded, although this engine does not time its batches.
        assert await rejections() >= 1


async def test_early_refusal_can_be_turned_off() -> None:
    async with dispatching(timed_engine(), early_refusal=False) as (dispatcher, _):
        dispatcher.submit(make_job(steps=40, deadline=time.monotonic() + 20))


async def test_a_full_queue_says_when_a_place_is_free() -> None:
    limits: dict[str, Any] = {"max_queued_jobs": 1, "max_resident_samples": 1}
    async with dispatching(timed_engine(), **limits) as (dispatcher, _):
        dispatcher.submit(make_job("running", steps=4))
        dispatcher.submit(make_job("waiting", steps=4))
        with pytest.raises(QueueFull) as caught:
            dispatcher.submit(make_job("c"))
        assert caught.value.retry_after == pytest.approx(0.5 + 4.5)


async def test_a_queue_is_bounded_in_work() -> None:
    limits: dict[str, Any] = {
        "max_queued_jobs": 9,
        "max_resident_samples": 1,
        "max_queued_megapixel_steps": 1.0,
    }
    async with dispatching(timed_engine(), **limits) as (dispatcher, _):
        dispatcher.submit(make_job("running", steps=4))
        # 512 x 512 pixels in three steps are 0.79 megapixel-steps.
        big = make_job("big", width=512, height=512, steps=3)
        dispatcher.submit(big)
        with pytest.raises(QueueFull, match="megapixel-steps") as caught:
            dispatcher.submit(replace(big, id="more"))
        assert caught.value.retry_after == pytest.approx(5.0)
        dispatcher.submit(make_job("small"))


async def test_a_job_larger_than_the_queues_work_limit_may_wait_alone() -> None:
    limits: dict[str, Any] = {
        "max_queued_jobs": 9,
        "max_resident_samples": 1,
        "max_queued_megapixel_steps": 1e-6,
    }
    async with dispatching(timed_engine(), **limits) as (dispatcher, _):
        dispatcher.submit(make_job("running"))
        dispatcher.submit(make_job("alone"))
        with pytest.raises(QueueFull):
            dispatcher.submit(make_job("second"))


async def test_estimates_are_compared_with_the_actual_times(clock: Clock) -> None:
    checked: list[EstimateChecked] = []

    class Recording(Observer):
        def on_event(self, event: object) -> None:
            if isinstance(event, EstimateChecked):
                checked.append(event)

    async with dispatching(timed_engine(), observer=Recording()) as (dispatcher, engine):
        active = dispatcher.submit(make_job("a", steps=4))
        dispatcher.submit(make_job("gone", steps=4))
        dispatcher.cancel("gone")
        clock.skip(4.0)
        engine.advance(4)
        await active.result()
    (event,) = checked
    assert event.model == "demo"
    assert event.estimate == pytest.approx(4.5)
    assert event.seconds == pytest.approx(4.0)


async def test_a_callers_jobs_are_bounded() -> None:
    async with dispatching() as (dispatcher, engine):
        caller = Caller(name="ann", max_jobs=1)
        first = dispatcher.submit(make_job("a", caller="ann"), caller)
        with pytest.raises(QuotaExceeded, match="wait until one has ended") as caught:
            dispatcher.submit(make_job("b", caller="ann"), caller)
        assert caught.value.subject == "caller:ann"
        dispatcher.submit(make_job("b", caller="bob"), Caller(name="bob", max_jobs=1))
        engine.finish("a")
        await first.result()
        dispatcher.submit(make_job("c", caller="ann"), caller)
        dispatcher.cancel("c")
        dispatcher.submit(make_job("d", caller="ann"), caller)


def test_a_callers_rate_is_bounded() -> None:
    quotas, caller = Quotas(), Caller(name="ann", jobs_per_minute=2)

    def admitted(now: float) -> bool:
        try:
            quotas.check(caller, now)
        except QuotaExceeded:
            quotas.check(Caller(name="bob", jobs_per_minute=1), now)
            return False
        quotas.accepted(caller)
        quotas.ended(caller)
        return True

    assert [admitted(0.0) for _ in range(3)] == [True, True, False]
    assert not admitted(29.0)
    assert [admitted(30.1) for _ in range(2)] == [True, False]
    # A day without jobs saves no more than one minute's tokens.
    assert [admitted(86400.0) for _ in range(3)] == [True, True, False]


async def test_rejected_jobs_do_not_count_against_a_callers_rate() -> None:
    async with dispatching(timed_engine()) as (dispatcher, _):
        caller = Caller(name="ann", jobs_per_minute=1)
        for _ in range(3):
            with pytest.raises(DeadlineExceeded):
                dispatcher.submit(
                    make_job(steps=40, deadline=time.monotonic() + 5, caller="ann"), caller
                )
        dispatcher.submit(make_job(caller="ann"), caller)


async def test_a_waiting_job_is_not_overtaken_forever() -> None:
    """One short job comes with each batch, and the engine holds one sample; a long job waits."""
    limits: dict[str, Any] = {"max_queued_jobs": 500, "max_resident_samples": 1}
    async with dispatching(timed_engine(), **limits) as (dispatcher, engine):
        now = time.monotonic()
        dispatcher.submit(make_job("first", steps=1, submitted_at=now))
        long = dispatcher.submit(make_job("long", steps=40, submitted_at=now))
        for index in range(100):
            # Each batch takes a second; the patience of the long job is ten seconds.
            dispatcher.submit(make_job(str(index), steps=1, submitted_at=now + index))
            engine.advance()
            await settle()
            if long.state is not JobState.QUEUED:
                break
        assert 5 < index < 15
