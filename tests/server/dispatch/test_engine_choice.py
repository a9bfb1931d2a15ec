"""Which of several engines gets a job, and what is estimated of it."""

import random
import statistics
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from darkroom_server.backends.fake import FakeEngine
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.events import EngineReady
from darkroom_server.core.model_runtime import ModelSpeed
from darkroom_server.dispatch import ActiveJob, Dispatcher
from darkroom_server.dispatch.engines.handle import EngineHandle
from darkroom_server.dispatch.estimation.remaining_work import remaining_work
from darkroom_server.dispatch.estimation.simulation import simulate_queue
from darkroom_server.dispatch.jobs.job import JobState
from tests.server.clock import Clock
from tests.server.dispatch.harness import settle, timed_engine
from tests.server.jobs import make_job

MODEL = replace(
    fake_model(), speed=ModelSpeed(passes=((2, 1.0), (4, 1.5), (8, 2.5), (16, 4.5)), decode=0.5)
)
SIZES = (64, 128)


def random_handles(dice: random.Random, number: int) -> list[EngineHandle]:
    """Eight engines with up to eight jobs each that have begun."""
    handles = []
    for index in range(8):
        handle = EngineHandle(index, FakeEngine())
        handle.set_ready(EngineReady((MODEL,), 0.0))
        for place in range(dice.randint(0, 8)):
            steps = dice.choice((8, 16, 40))
            job = make_job(f"{number} {index} {place}", steps=steps, width=dice.choice(SIZES))
            active = ActiveJob(job, MODEL)
            active.state, active.remaining = JobState.DENOISING, {0: dice.randint(1, steps)}
            handle.jobs[job.id] = active
        handles.append(handle)
    return handles


def test_the_engine_that_seems_to_finish_a_job_first_does_so_in_the_simulation() -> None:
    dice = random.Random(7)
    losses: dict[str, list[float]] = {"chosen": [], "fewest jobs": []}
    for number in range(40):
        handles = random_handles(dice, number)
        new = make_job("new", steps=dice.choice((8, 16, 40)), width=dice.choice(SIZES))
        work = remaining_work(ActiveJob(new, MODEL))
        finishes = [
            simulate_queue([each.load()], [work], sys.maxsize).finishes["new"] for each in handles
        ]
        chosen = min(handles, key=lambda each: each.finish_seconds(work)).index
        fewest = min(handles, key=lambda each: len(each.jobs)).index
        losses["chosen"].append(finishes[chosen] / min(finishes))
        losses["fewest jobs"].append(finishes[fewest] / min(finishes))
    mean = {name: statistics.mean(each) for name, each in losses.items()}
    assert mean["chosen"] < 1.01
    assert mean["fewest jobs"] > 1.02


@pytest.fixture
async def two(clock: Clock) -> AsyncIterator[tuple[Dispatcher, list[FakeEngine]]]:
    """Two engines with two places each; no time passes."""
    clock.stop()
    engines = [timed_engine(), timed_engine()]
    dispatcher = Dispatcher(engines, ["demo"], max_queued_jobs=4, max_resident_samples=2)
    dispatcher.start()
    await dispatcher.loaded()
    yield dispatcher, engines
    await dispatcher.close()


async def test_a_job_that_finds_room_is_estimated_by_the_jobs_of_its_engine(
    two: tuple[Dispatcher, list[FakeEngine]],
) -> None:
    dispatcher, engines = two
    long = dispatcher.submit(make_job("long", steps=40))
    short = dispatcher.submit(make_job("short", steps=4))
    assert [[job.id for job in engine.jobs] for engine in engines] == [["long"], ["short"]]
    assert long.estimate is not None
    assert short.estimate is not None
    assert (long.estimate.engine, short.estimate.engine) == (0, 1)
    assert long.estimate.total == pytest.approx(40.5)
    assert short.estimate.total == pytest.approx(4.5)
    # The backlog is that of both.
    assert dispatcher.backlog.seconds("demo") == pytest.approx(40.5)
    third = dispatcher.submit(make_job("third", steps=4))
    fourth = dispatcher.submit(make_job("fourth", steps=4))
    waits = dispatcher.submit(make_job("waits", steps=4))
    # Beside the long one there is one decode less to wait for.
    for active, engine in ((third, 0), (fourth, 1), (waits, None)):
        assert active.estimate is not None
        assert active.estimate.engine == engine
    assert waits.position == 0
    assert waits.estimate is not None
    assert waits.estimate.queue_wait > 0.0


async def test_an_estimate_of_an_engine_that_is_full_by_now_decides_nothing(
    two: tuple[Dispatcher, list[FakeEngine]],
) -> None:
    dispatcher, engines = two
    pool = dispatcher._pool
    active = ActiveJob(make_job("new", submitted_at=time.monotonic()), timed_engine().models[0])
    active.estimate = dispatcher.estimate(active.job)
    assert active.estimate is not None
    assert active.estimate.engine == 0
    assert pool.choose(active) is pool.engines[0]
    for number in range(2):
        pool.engines[0].submit(ActiveJob(make_job(f"other {number}"), active.model))
    assert pool.choose(active) is pool.engines[1]
    engines[0].advance(4)
    await settle()
