"""Jobs that take free rows of batches before one that waits for the turn of its model."""

from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio

from darkroom_server.backends.fake import FakeEngine
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.dispatch import ActiveJob, Dispatcher, lifecycle
from darkroom_server.dispatch.engines.handle import EngineHandle
from tests.server.clock import Clock
from tests.server.dispatch.harness import SPEED, dispatching, settle
from tests.server.jobs import make_job

STEPS = 4


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(monkeypatch)
    clock.stop()
    return clock


@pytest_asyncio.fixture
async def two(clock: Clock) -> AsyncIterator[tuple[Dispatcher, FakeEngine]]:
    """Two models in memory, with 8 rows in a batch, which are 4 guided images."""
    models = [replace(fake_model(id), speed=SPEED) for id in ("a", "b")]
    models = [replace(each, limits=replace(each.limits, max_rows=8)) for each in models]
    async with dispatching(
        FakeEngine(models), max_queued_jobs=64, max_resident_samples=64
    ) as found:
        yield found


def submit(dispatcher: Dispatcher, clock: Clock, model: str, id: str) -> ActiveJob:
    clock.skip(0.01)
    return dispatcher.submit(make_job(id, model=model, steps=STEPS, guidance_scale=5.0))


def in_engine(engine: FakeEngine) -> list[str]:
    return [job.id for job in engine.jobs]


async def test_jobs_of_the_running_model_take_its_free_rows(
    two: tuple[Dispatcher, FakeEngine], clock: Clock
) -> None:
    dispatcher, engine = two
    submit(dispatcher, clock, "a", "a0")
    waits = submit(dispatcher, clock, "b", "b0")
    assert in_engine(engine) == ["a0"]
    later = [submit(dispatcher, clock, "a", f"a{n}") for n in range(1, 6)]
    assert in_engine(engine) == ["a0", "a1", "a2", "a3"], "8 rows, and no more"
    assert waits.position == 0
    assert [job.position for job in later[3:]] == [1, 2]
    engine.advance(STEPS)
    await settle()
    assert in_engine(engine) == ["b0"]
    engine.advance(STEPS)
    await settle()
    assert in_engine(engine) == ["a4", "a5"]
    engine.advance(STEPS)


async def test_a_job_that_has_waited_long_lets_nobody_pass(
    two: tuple[Dispatcher, FakeEngine], clock: Clock
) -> None:
    dispatcher, engine = two
    submit(dispatcher, clock, "a", "a0")
    waits = submit(dispatcher, clock, "b", "b0")
    assert waits.estimate is not None
    clock.skip(lifecycle.PASSING_SHARE * waits.estimate.run_time)
    submit(dispatcher, clock, "a", "a1")
    assert in_engine(engine) == ["a0"]
    engine.advance(STEPS)
    await settle()
    assert in_engine(engine) == ["b0"]
    engine.advance(STEPS)
    await settle()
    engine.advance(STEPS)


async def test_an_endless_stream_of_one_model_does_not_keep_another_waiting(
    two: tuple[Dispatcher, FakeEngine], clock: Clock
) -> None:
    dispatcher, engine = two
    submit(dispatcher, clock, "a", "a0")
    waits = submit(dispatcher, clock, "b", "b0")
    assert waits.estimate is not None
    bound = (lifecycle.PASSING_SHARE + 1.0) * waits.estimate.run_time
    waited = 0.0
    for n in range(1, 100):
        submit(dispatcher, clock, "a", f"a{n}")
        engine.advance(1)
        await settle()
        clock.skip(SPEED.passes[-1][1])
        waited += SPEED.passes[-1][1]
        if "b0" in in_engine(engine) or waits.ended:
            break
    assert waited <= bound + STEPS * SPEED.passes[-1][1]
    while dispatcher.counts.live:
        engine.advance(1)
        await settle()


async def test_a_job_that_fills_no_free_rows_does_not_pass(
    two: tuple[Dispatcher, FakeEngine], clock: Clock
) -> None:
    dispatcher, engine = two
    submit(dispatcher, clock, "a", "a0")
    submit(dispatcher, clock, "b", "b0")
    clock.skip(0.01)
    dispatcher.submit(make_job("large", model="a", steps=STEPS, guidance_scale=5.0, image_count=4))
    dispatcher.submit(make_job("alone", model="a", steps=STEPS, guidance_scale=5.0, exact=True))
    assert in_engine(engine) == ["a0"]
    while dispatcher.counts.live:
        engine.advance(1)
        await settle()


async def test_a_pass_over_the_queue_looks_at_the_engines_once(
    two: tuple[Dispatcher, FakeEngine], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of jobs may wait, and each that comes or ends lets the queue be looked at."""
    dispatcher, engine = two
    looks: Counter[str] = Counter()

    def counted(name: str) -> Any:
        look = getattr(EngineHandle, name)

        def count(handle: EngineHandle, *arguments: Any) -> Any:
            looks[name] += 1
            return look(handle, *arguments)

        return count

    for name in ("has_room", "has_room_later", "free_rows", "holds"):
        monkeypatch.setattr(EngineHandle, name, counted(name))
    for n in range(4):
        submit(dispatcher, clock, "a", f"a{n}")
    seen = []
    for size in (2, 20):
        for n in range(size):
            submit(dispatcher, clock, "b", f"b{size}-{n}")
            submit(dispatcher, clock, "a", f"a{size}-{n}")
        looks.clear()
        dispatcher._lifecycle.feed()
        seen.append(looks.copy())
    assert dispatcher.queued_jobs == 44
    assert seen[0] == seen[1]
    assert (seen[0]["has_room"], seen[0]["has_room_later"], seen[0]["free_rows"]) == (1, 1, 1)
    assert len(engine.jobs) == 4
