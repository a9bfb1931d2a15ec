"""What the dispatcher knows about one engine."""

from dataclasses import replace
from typing import Any

import pytest

from darkroom_server.backends.fake import FakeEngine
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.errors import TooLarge
from darkroom_server.core.events import BatchDone, EngineReady, SampleBytesCorrected
from darkroom_server.core.model import ModelInfo
from darkroom_server.dispatch.engines.handle import EngineHandle
from darkroom_server.dispatch.estimation.batch_times import Group
from darkroom_server.dispatch.jobs.job import ActiveJob
from tests.server.dispatch.harness import SPEED, dispatching, settle
from tests.server.jobs import make_job

SMALL, LARGE = Group("demo", 64, 64), Group("demo", 128, 128)


def batch_done(group: Group, max_rows: int) -> BatchDone:
    return BatchDone(
        model=group.model,
        width=group.width,
        height=group.height,
        rows=2,
        seconds=0.1,
        max_rows=max_rows,
    )


def test_the_handle_follows_the_row_limit_of_the_engine() -> None:
    handle = EngineHandle(0, FakeEngine())
    handle.set_ready(EngineReady((fake_model(),), 0.0))
    usual = handle.load().max_rows(LARGE)
    assert usual > 2
    handle.record_batch(batch_done(LARGE, 2))
    assert handle.load().max_rows(LARGE) == 2
    assert handle.load().max_rows(SMALL) >= usual
    handle.record_batch(batch_done(LARGE, usual))
    assert handle.load().max_rows(LARGE) == usual
    handle.record_batch(batch_done(LARGE, 2))
    handle.set_dead()
    assert handle.load().max_rows(LARGE) == usual, "a new engine starts with its own limits"


def held_model(images: int) -> ModelInfo:
    """A model with memory for a batch of 2 rows and for what ``images`` images hold."""
    model = fake_model()
    memory = replace(
        model.memory,
        bytes_per_row=1000,
        bytes_per_decode=1000,
        bytes_per_sample=1000,
        available_bytes=2 * 1000 + images * 1000,
    )
    limits = replace(model.limits, max_rows=2)
    return replace(model, memory=memory, speed=SPEED, limits=limits)


def active(id: str, images: int = 1) -> ActiveJob:
    return ActiveJob(make_job(id, image_count=images, guidance_scale=1.0), held_model(0))


def test_an_engine_has_room_for_what_its_images_hold() -> None:
    handle = EngineHandle(0, FakeEngine())
    handle.set_ready(EngineReady((held_model(3),), 0.0))
    assert handle.has_room(64, active("alone", images=4)), "admission has checked that it fits"
    handle.submit(active("a", images=2))
    assert handle.held_bytes == 2000
    assert handle.has_room(64, active("b"))
    assert not handle.has_room(64, active("b", images=2))
    handle.correct(SampleBytesCorrected("demo", 1200))
    assert handle.held_bytes == 2400
    assert not handle.has_room(64, active("b"))
    handle.remove(handle.jobs["a"])
    assert handle.has_room(64, active("b", images=2))


def test_a_job_of_another_model_waits_for_a_shorter_one() -> None:
    """Two models share no batches: turns would make both take longer."""
    one, other = (replace(fake_model(id), speed=SPEED) for id in ("one", "other"))

    def job(id: str, model: ModelInfo, steps: int, **fields: Any) -> ActiveJob:
        made = make_job(id, model=model.id, steps=steps, submitted_at=100.0)
        return ActiveJob(replace(made, **fields), model)

    handle = EngineHandle(0, FakeEngine([one, other]))
    handle.set_ready(EngineReady((one, other), 0.0))
    handle.submit(job("running", one, 8))
    assert handle.has_room(64, job("same", one, 40))
    assert not handle.has_room(64, job("longer", other, 12))
    assert handle.has_room(64, job("shorter", other, 4))
    assert handle.has_room(64, job("urgent", other, 12, deadline=101.0))
    assert not handle.has_room(64, job("late", other, 4, submitted_at=101.5))
    running = handle.jobs["running"]
    running.remaining[0] = 1
    assert not handle.has_room(64, job("shorter", other, 4)), "it is nearly done"
    handle.remove(running)
    assert handle.has_room(64, job("longer", other, 12))


def test_the_jobs_of_a_model_end_after_their_batches() -> None:
    one, other = (replace(fake_model(id), speed=SPEED) for id in ("one", "other"))
    handle = EngineHandle(0, FakeEngine([one, other]))
    handle.set_ready(EngineReady((one, other), 0.0))
    assert handle.drain_seconds() == {}
    handle.submit(ActiveJob(make_job("a", model="one", steps=8), one))
    assert handle.drain_seconds() == pytest.approx({"one": 8.0})
    handle.jobs["a"].remaining[0] = 3
    assert handle.drain_seconds() == pytest.approx({"one": 3.0})
    handle.submit(ActiveJob(make_job("b", model="other", steps=10, image_count=4), other))
    assert handle.drain_seconds() == pytest.approx({"one": 3.0 + 3.0, "other": 25.0 + 3.0})


async def test_jobs_wait_for_the_memory_of_an_engine() -> None:
    engine = FakeEngine([held_model(2)])
    async with dispatching(engine, max_resident_samples=64) as (dispatcher, _):
        jobs = [
            dispatcher.submit(make_job(str(i), steps=4, guidance_scale=1.0, image_count=1))
            for i in range(3)
        ]
        assert (dispatcher.running_jobs, dispatcher.queued_jobs) == (2, 1)
        waiting = dispatcher.estimate(make_job("new", steps=4, guidance_scale=1.0))
        assert waiting is not None
        assert waiting.queue_wait > 4.0, "it waits for a place"
        engine.advance(4)
        await settle()
        assert (dispatcher.running_jobs, dispatcher.queued_jobs) == (1, 0)
        engine.advance(4)
        assert all([await job.result() for job in jobs])


async def test_images_that_never_fit_together_are_rejected() -> None:
    async with dispatching(FakeEngine([held_model(2)])) as (dispatcher, engine):
        fits = dispatcher.submit(make_job("fits", image_count=3, guidance_scale=1.0))
        with pytest.raises(TooLarge, match=r"a job of 4 images .* ask for fewer or smaller ones"):
            dispatcher.submit(make_job("too many", image_count=4, guidance_scale=1.0))
        engine.advance(40)
        await fits.result()
