"""No accepted job is lost when an engine dies."""

import asyncio
import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from darkroom_server.backends.fake import FakeEngine, fake_image
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.errors import Failure, GenerationFailed, Reason, StartupError
from darkroom_server.core.events import BatchDone, Event
from darkroom_server.core.job import Job
from darkroom_server.dispatch import Dispatcher, State
from darkroom_server.dispatch.jobs.job import CRASH_SUSPECT
from darkroom_server.dispatch.jobs.outcomes import Finished
from tests.server.dispatch.harness import settle
from tests.server.jobs import make_job


class Pool:
    """Fake engines, their dispatcher, and the jobs that each engine got."""

    def __init__(self, count: int, max_restarts: int = 5, *, load: bool = True) -> None:
        self.submitted: asyncio.Queue[tuple[int, Job]] = asyncio.Queue()
        self.states: asyncio.Queue[State] = asyncio.Queue()
        self.engines = [self._engine(index, load) for index in range(count)]
        self.dispatcher = Dispatcher(
            self.engines,
            ["demo"],
            max_queued_jobs=20,
            max_resident_samples=4,
            max_restarts=max_restarts,
            on_state=self.states.put_nowait,
        )

    def _engine(self, index: int, load: bool) -> FakeEngine:
        return FakeEngine(load=load, on_submit=lambda job: self.submitted.put_nowait((index, job)))

    async def becomes_ready(self) -> None:
        """Wait until an engine becomes ready."""
        while await self.states.get() is not State.READY:
            pass


@asynccontextmanager
async def engine_pool(count: int = 1, max_restarts: int = 5) -> AsyncIterator[Pool]:
    pool = Pool(count, max_restarts)
    pool.dispatcher.start()
    for _ in pool.engines:
        await pool.becomes_ready()
    yield pool
    await pool.dispatcher.close()
    counts = pool.dispatcher.counts
    assert counts.accepted == counts.ended


async def test_jobs_are_run_again_with_their_seeds() -> None:
    async with engine_pool() as pool:
        active = [pool.dispatcher.submit(make_job(id, seed=i)) for i, id in enumerate("abc")]
        first = [(await pool.submitted.get())[1] for _ in active]
        pool.engines[0].die()
        again = [(await pool.submitted.get())[1] for _ in active]
        assert [(job.id, job.seed) for job in again] == [(job.id, job.seed) for job in first]
        pool.engines[0].advance(4)
        for each in active:
            assert (await each.result()).images == (fake_image(each.job, 0, fake_model(), 2),)


async def test_finished_images_are_kept() -> None:
    async with engine_pool() as pool:
        active = pool.dispatcher.submit(make_job("pair", image_count=2))
        _, job = await pool.submitted.get()
        pool.engines[0].deliver("pair", 0)
        pool.engines[0].die()
        _, again = await pool.submitted.get()
        assert again.image_indices == [1]
        pool.engines[0].advance(4)
        images = (await active.result()).images
        assert [image.seed for image in images] == [job.seed, job.seed + 1]


async def test_a_job_whose_images_were_all_finished_is_finished() -> None:
    async with engine_pool() as pool:
        active = pool.dispatcher.submit(make_job("whole"))
        await pool.submitted.get()
        pool.engines[0].deliver("whole", 0)
        pool.engines[0].die()
        assert isinstance(await active.result(), Finished)


async def test_new_jobs_queue_while_the_engine_restarts() -> None:
    async with engine_pool() as pool:
        pool.engines[0].die()
        await settle()
        assert not pool.dispatcher.ready
        active = pool.dispatcher.submit(make_job("patient"))
        assert pool.dispatcher.queued_jobs == 1
        await pool.submitted.get()
        pool.engines[0].advance(4)
        await active.result()


async def test_a_poison_job_fails_and_the_others_finish() -> None:
    async with engine_pool() as pool:
        poison = pool.dispatcher.submit(make_job("poison"))
        bystander = pool.dispatcher.submit(make_job("bystander"))
        engine = pool.engines[0]
        for _ in range(2):
            await pool.submitted.get()
        engine.advance()
        engine.die()
        # Both ran, so each now runs alone: first come, first served.
        _, alone = await pool.submitted.get()
        assert [job.id for job in engine.jobs] == [alone.id] == ["poison"]
        newcomer = pool.dispatcher.submit(make_job("newcomer"))
        engine.advance()
        engine.die()
        with pytest.raises(GenerationFailed) as caught:
            await poison.result()
        assert caught.value.reason is Reason.ENGINE_CRASHED
        for _ in range(2):
            await pool.submitted.get()
            engine.advance(4)
            await settle()
        await bystander.result()
        await newcomer.result()


async def test_a_job_that_had_not_begun_is_not_a_crash_suspect() -> None:
    async with engine_pool() as pool:
        active = pool.dispatcher.submit(make_job("idle"))
        for _ in range(3):
            await pool.submitted.get()
            pool.engines[0].die()
        await pool.submitted.get()
        pool.engines[0].advance(4)
        await active.result()


async def test_a_job_that_kills_the_engine_while_it_is_encoded_is_a_crash_suspect() -> None:
    async with engine_pool() as pool:
        engine = pool.engines[0]
        bystander = pool.dispatcher.submit(make_job("bystander", steps=9))
        await pool.submitted.get()
        engine.advance()
        poison = pool.dispatcher.submit(make_job("poison"))
        await pool.submitted.get()
        engine.take_newcomers()
        engine.die()
        for _ in range(2):  # Each runs alone: both were in the engine when it died.
            _, alone = await pool.submitted.get()
            assert [job.id for job in engine.jobs] == [alone.id]
            if alone.id == "poison":
                engine.take_newcomers()
                engine.die()
            else:
                engine.advance(9)
        with pytest.raises(GenerationFailed) as caught:
            await poison.result()
        assert caught.value.reason is Reason.ENGINE_CRASHED
        await bystander.result()


async def test_an_encoded_job_is_not_a_crash_suspect_during_a_batch_without_it() -> None:
    async with engine_pool() as pool:
        active = pool.dispatcher.submit(make_job("encoded"))
        await pool.submitted.get()
        pool.engines[0].take_newcomers()
        await settle()
        assert active.state in CRASH_SUSPECT
        # A batch of other jobs comes first.
        pool.dispatcher._pool.engines[0].record_batch(
            BatchDone(model="demo", width=64, height=64, rows=2, seconds=0.1)
        )
        assert active.state not in CRASH_SUSPECT


async def crash_twice(pool: Pool, id: str) -> None:
    """Run a job that kills the engine twice, and wait until the engine is ready again."""
    active = pool.dispatcher.submit(make_job(id))
    for _ in range(2):
        await pool.submitted.get()
        pool.engines[0].advance()
        pool.engines[0].die()
    with pytest.raises(GenerationFailed) as caught:
        await active.result()
    assert caught.value.reason is Reason.ENGINE_CRASHED
    await pool.becomes_ready()


async def test_crashes_that_a_poison_job_explains_do_not_count_against_the_engine() -> None:
    async with engine_pool(max_restarts=3) as pool:
        for index in range(3):
            await crash_twice(pool, f"poison {index}")
            good = pool.dispatcher.submit(make_job(f"good {index}"))
            await pool.submitted.get()
            pool.engines[0].advance(4)
            await good.result()


async def test_crashes_without_a_finished_job_between_count_against_the_engine() -> None:
    async with engine_pool(max_restarts=2) as pool:
        await crash_twice(pool, "first")
        pool.dispatcher.submit(make_job("second"))
        for _ in range(2):
            await pool.submitted.get()
            pool.engines[0].advance()
            pool.engines[0].die()
        assert "3 times in ten minutes" in await pool.dispatcher.availability.failed()


async def test_an_engine_that_cannot_be_started_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with engine_pool() as pool:
        engine = pool.engines[0]
        start, tries = engine.start, iter([OSError("Cannot allocate memory"), None])

        def fail_once(emit: Callable[[Event], None]) -> None:
            if error := next(tries):
                raise error
            start(emit)

        monkeypatch.setattr(engine, "start", fail_once)
        active = pool.dispatcher.submit(make_job("patient"))
        await pool.submitted.get()
        engine.die()
        await pool.submitted.get()
        engine.advance(4)
        await active.result()


async def test_an_engine_that_can_never_be_started_fails_for_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with engine_pool(max_restarts=2) as pool:

        def never(emit: Callable[[Event], None]) -> None:
            raise FileNotFoundError("no Python")

        monkeypatch.setattr(pool.engines[0], "start", never)
        pool.engines[0].die()
        assert "cannot be started: no Python" in await pool.dispatcher.availability.failed()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.EAGAIN, "Resource temporarily unavailable"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("can't start new thread"),
    ],
    ids=lambda error: str(error),
)
async def test_a_start_without_resources_does_not_count_as_a_death(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async with engine_pool(max_restarts=1) as engines:
        engine = engines.engines[0]
        start, failures = engine.start, [error] * 5

        def fail_often(emit: Callable[[Event], None]) -> None:
            if failures:
                raise failures.pop()
            start(emit)

        monkeypatch.setattr(engine, "start", fail_often)
        active = engines.dispatcher.submit(make_job("patient"))
        await engines.submitted.get()
        engine.die()
        await engines.submitted.get()
        engine.advance(4)
        await active.result()
        assert not failures


async def test_an_engine_that_dies_too_often_is_not_restarted_and_others_go_on() -> None:
    async with engine_pool(2, max_restarts=0) as pool:
        active = pool.dispatcher.submit(make_job("moved"))
        first, _ = await pool.submitted.get()
        pool.engines[first].die()
        second, _ = await pool.submitted.get()
        assert second != first
        pool.engines[second].advance(4)
        await active.result()
        assert pool.dispatcher.ready
        last = pool.dispatcher.submit(make_job("last"))
        assert (await pool.submitted.get())[0] == second
        pool.engines[second].die()
        assert "1 times in ten minutes" in await pool.dispatcher.availability.failed()
        with pytest.raises(GenerationFailed) as caught:
            await last.result()
        assert caught.value.reason is Reason.ENGINE_FAILED


async def test_one_engine_that_loads_is_enough() -> None:
    pool = Pool(3, load=False)
    pool.dispatcher.start()
    pool.engines[0].die("no such folder", fatal=True)
    await settle()
    pool.engines[1].become_ready()
    await pool.dispatcher.loaded()
    pool.engines[2].die("no such folder", fatal=True)
    await settle()
    active = pool.dispatcher.submit(make_job("alone"))
    assert (await pool.submitted.get())[0] == 1
    pool.engines[1].advance(4)
    await active.result()
    await pool.dispatcher.close()


async def test_startup_fails_if_no_engine_loads() -> None:
    pool = Pool(2, load=False)
    pool.dispatcher.start()
    pool.engines[0].die("no such folder", fatal=True)
    await settle()
    pool.engines[1].die("no such folder", fatal=True)
    with pytest.raises(StartupError, match="no such folder"):
        await pool.dispatcher.loaded()
    await pool.dispatcher.close()


async def test_an_engine_that_is_killed_while_it_loads_is_restarted() -> None:
    pool = Pool(1, load=False)
    pool.dispatcher.start()
    pool.engines[0]._load = True
    pool.engines[0].die()
    await pool.becomes_ready()
    await pool.dispatcher.close()


async def test_too_many_crashes_fail_the_server() -> None:
    async with engine_pool(max_restarts=1) as pool:
        active = pool.dispatcher.submit(make_job("last"))
        await pool.submitted.get()
        pool.engines[0].die()
        await pool.submitted.get()
        pool.engines[0].die()
        assert "2 times in ten minutes" in await pool.dispatcher.availability.failed()
        with pytest.raises(GenerationFailed) as caught:
            await active.result()
        assert caught.value.reason is Reason.ENGINE_FAILED


async def test_jobs_go_to_the_engine_with_the_least_work() -> None:
    async with engine_pool(2) as pool:
        pool.dispatcher.submit(make_job("long", steps=100))
        pool.dispatcher.submit(make_job("short", steps=2))
        pool.dispatcher.submit(make_job("next", steps=2))
        engine_of = {job.id: index for index, job in [await pool.submitted.get() for _ in range(3)]}
        assert engine_of["short"] == engine_of["next"] != engine_of["long"]


async def test_losing_one_engine_moves_its_jobs_to_the_others() -> None:
    async with engine_pool(2) as pool:
        active = [pool.dispatcher.submit(make_job(id)) for id in "ab"]
        engine_of = {job.id: index for index, job in [await pool.submitted.get() for _ in active]}
        assert set(engine_of.values()) == {0, 1}
        pool.engines[engine_of["a"]].die()
        index, job = await pool.submitted.get()
        assert (index, job.id) == (engine_of["b"], "a")
        assert pool.dispatcher.ready
        pool.engines[engine_of["b"]].advance(4)
        for each in active:
            await each.result()


async def test_a_cancelled_job_is_not_run_again() -> None:
    async with engine_pool() as pool:
        pool.dispatcher.submit(make_job("gone"))
        await pool.submitted.get()
        pool.dispatcher.cancel("gone")
        pool.engines[0].die()
        await pool.becomes_ready()
        assert pool.engines[0].jobs == []
        assert pool.dispatcher.running_jobs == pool.dispatcher.queued_jobs == 0


async def test_a_failure_is_not_a_crash() -> None:
    async with engine_pool() as pool:
        active = pool.dispatcher.submit(make_job("bad"))
        await pool.submitted.get()
        pool.engines[0].fail("bad", Failure(Reason.NON_FINITE, "not a number"))
        with pytest.raises(GenerationFailed):
            await active.result()
        assert pool.dispatcher.ready
