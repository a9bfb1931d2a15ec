"""An engine dies, and nothing that was accepted is lost."""

import asyncio
import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from darkroom_server.backends.fake import FakeEngine, fake_image
from darkroom_server.core.errors import Failure, GenerationFailed, Reason, StartupError
from darkroom_server.core.events import BatchDone, Event
from darkroom_server.core.job import Job
from darkroom_server.dispatch import Dispatcher, State
from darkroom_server.dispatch.engines import pool
from darkroom_server.dispatch.jobs.job import CRASH_SUSPECT
from darkroom_server.dispatch.jobs.outcomes import Finished
from tests.server.jobs import make_job

from .desk import settle


class Crew:
    """Fake engines, a dispatcher, and what each engine was given."""

    def __init__(self, count: int, max_restarts: int = 5, *, load: bool = True) -> None:
        self.given: asyncio.Queue[tuple[int, Job]] = asyncio.Queue()
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
        return FakeEngine(load=load, on_submit=lambda job: self.given.put_nowait((index, job)))

    async def comes_back(self) -> None:
        while await self.states.get() is not State.READY:
            pass


@asynccontextmanager
async def crew(count: int = 1, max_restarts: int = 5) -> AsyncIterator[Crew]:
    crew = Crew(count, max_restarts)
    crew.dispatcher.start()
    for _ in crew.engines:
        await crew.comes_back()
    yield crew
    await crew.dispatcher.close()
    counts = crew.dispatcher.counts
    assert counts.accepted == counts.ended


async def test_jobs_are_run_again_with_their_seeds() -> None:
    async with crew() as it:
        accepted = [it.dispatcher.submit(make_job(id, seed=i)) for i, id in enumerate("abc")]
        first = [(await it.given.get())[1] for _ in accepted]
        it.engines[0].die()
        again = [(await it.given.get())[1] for _ in accepted]
        assert [(job.id, job.seed) for job in again] == [(job.id, job.seed) for job in first]
        it.engines[0].advance(4)
        for one in accepted:
            assert (await one.result()).images == (fake_image(one.job, 0),)


async def test_finished_images_are_kept() -> None:
    async with crew() as it:
        accepted = it.dispatcher.submit(make_job("pair", image_count=2))
        _, job = await it.given.get()
        it.engines[0].deliver("pair", 0)
        it.engines[0].die()
        _, again = await it.given.get()
        assert again.image_indices == [1]
        it.engines[0].advance(4)
        images = (await accepted.result()).images
        assert [image.seed for image in images] == [job.seed, job.seed + 1]


async def test_a_job_whose_images_were_all_there_is_finished() -> None:
    async with crew() as it:
        accepted = it.dispatcher.submit(make_job("whole"))
        await it.given.get()
        it.engines[0].deliver("whole", 0)
        it.engines[0].die()
        assert isinstance(await accepted.result(), Finished)


async def test_new_jobs_queue_while_the_engine_comes_back() -> None:
    async with crew() as it:
        it.engines[0].die()
        await settle()
        assert not it.dispatcher.ready
        accepted = it.dispatcher.submit(make_job("patient"))
        assert it.dispatcher.queued_jobs == 1
        await it.given.get()
        it.engines[0].advance(4)
        await accepted.result()


async def test_what_kills_the_engine_twice_fails_and_the_others_go_on() -> None:
    async with crew() as it:
        poison = it.dispatcher.submit(make_job("poison"))
        bystander = it.dispatcher.submit(make_job("bystander"))
        engine = it.engines[0]
        for _ in range(2):
            await it.given.get()
        engine.advance()
        engine.die()
        # Both ran, so each is now drawn alone: the first to come is the first to go.
        _, alone = await it.given.get()
        assert [job.id for job in engine.jobs] == [alone.id] == ["poison"]
        newcomer = it.dispatcher.submit(make_job("newcomer"))
        engine.advance()
        engine.die()
        with pytest.raises(GenerationFailed) as caught:
            await poison.result()
        assert caught.value.reason is Reason.ENGINE_CRASHED
        for _ in range(2):
            await it.given.get()
            engine.advance(4)
            await settle()
        await bystander.result()
        await newcomer.result()


async def test_what_had_not_begun_is_no_suspect() -> None:
    async with crew() as it:
        accepted = it.dispatcher.submit(make_job("idle"))
        for _ in range(3):
            await it.given.get()
            it.engines[0].die()
        await it.given.get()
        it.engines[0].advance(4)
        await accepted.result()


async def test_what_kills_the_engine_as_it_is_encoded_is_a_suspect() -> None:
    async with crew() as it:
        engine = it.engines[0]
        drawn = it.dispatcher.submit(make_job("drawn", steps=9))
        await it.given.get()
        engine.advance()
        poison = it.dispatcher.submit(make_job("poison"))
        await it.given.get()
        engine.take_newcomers()
        engine.die()
        for _ in range(2):  # Each alone; both were in when it died.
            _, alone = await it.given.get()
            assert [job.id for job in engine.jobs] == [alone.id]
            if alone.id == "poison":
                engine.take_newcomers()
                engine.die()
            else:
                engine.advance(9)
        with pytest.raises(GenerationFailed) as caught:
            await poison.result()
        assert caught.value.reason is Reason.ENGINE_CRASHED
        await drawn.result()


async def test_what_is_encoded_and_waits_for_its_first_pass_is_no_suspect() -> None:
    async with crew() as it:
        accepted = it.dispatcher.submit(make_job("encoded"))
        await it.given.get()
        it.engines[0].take_newcomers()
        await settle()
        assert accepted.state in CRASH_SUSPECT
        # A pass of others comes first.
        it.dispatcher._pool.engines[0].record_batch(
            BatchDone(model="demo", width=64, height=64, rows=2, seconds=0.1)
        )
        assert accepted.state not in CRASH_SUSPECT


async def poisoned(it: Crew, id: str) -> None:
    """A job that kills the engine twice."""
    accepted = it.dispatcher.submit(make_job(id))
    for _ in range(2):
        await it.given.get()
        it.engines[0].advance()
        it.engines[0].die()
    with pytest.raises(GenerationFailed) as caught:
        await accepted.result()
    assert caught.value.reason is Reason.ENGINE_CRASHED
    await it.comes_back()


async def test_deaths_that_one_job_explains_are_not_the_end() -> None:
    async with crew(max_restarts=3) as it:
        for index in range(3):
            await poisoned(it, f"poison {index}")
            good = it.dispatcher.submit(make_job(f"good {index}"))
            await it.given.get()
            it.engines[0].advance(4)
            await good.result()


async def test_an_engine_that_draws_nothing_is_to_blame_itself() -> None:
    async with crew(max_restarts=2) as it:
        await poisoned(it, "first")
        it.dispatcher.submit(make_job("second"))
        for _ in range(2):
            await it.given.get()
            it.engines[0].advance()
            it.engines[0].die()
        assert "3 times in ten minutes" in await it.dispatcher.availability.failed()


async def test_an_engine_that_cannot_be_started_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with crew() as it:
        engine = it.engines[0]
        start, tries = engine.start, iter([OSError("Cannot allocate memory"), None])

        def reluctant(emit: Callable[[Event], None]) -> None:
            if error := next(tries):
                raise error
            start(emit)

        monkeypatch.setattr(engine, "start", reluctant)
        accepted = it.dispatcher.submit(make_job("patient"))
        await it.given.get()
        engine.die()
        await it.given.get()
        engine.advance(4)
        await accepted.result()


async def test_an_engine_that_can_never_be_started_is_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with crew(max_restarts=2) as it:

        def never(emit: Callable[[Event], None]) -> None:
            raise FileNotFoundError("no Python")

        monkeypatch.setattr(it.engines[0], "start", never)
        it.engines[0].die()
        assert "cannot be started: no Python" in await it.dispatcher.availability.failed()


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
    monkeypatch.setattr(pool, "FIRST_BACKOFF_SECONDS", 0.001)
    async with crew(max_restarts=1) as it:
        engine = it.engines[0]
        start, failures = engine.start, [error] * 5

        def reluctant(emit: Callable[[Event], None]) -> None:
            if failures:
                raise failures.pop()
            start(emit)

        monkeypatch.setattr(engine, "start", reluctant)
        accepted = it.dispatcher.submit(make_job("patient"))
        await it.given.get()
        engine.die()
        await it.given.get()
        engine.advance(4)
        await accepted.result()
        assert not failures


async def test_an_engine_that_dies_too_often_is_given_up_and_others_go_on() -> None:
    async with crew(2, max_restarts=0) as it:
        accepted = it.dispatcher.submit(make_job("moved"))
        first, _ = await it.given.get()
        it.engines[first].die()
        second, _ = await it.given.get()
        assert second != first
        it.engines[second].advance(4)
        await accepted.result()
        assert it.dispatcher.ready
        last = it.dispatcher.submit(make_job("last"))
        assert (await it.given.get())[0] == second
        it.engines[second].die()
        assert "1 times in ten minutes" in await it.dispatcher.availability.failed()
        with pytest.raises(GenerationFailed) as caught:
            await last.result()
        assert caught.value.reason is Reason.ENGINE_FAILED


async def test_one_engine_that_loads_is_enough() -> None:
    it = Crew(3, load=False)
    it.dispatcher.start()
    it.engines[0].die("no such folder", fatal=True)
    await settle()
    it.engines[1].become_ready()
    await it.dispatcher.loaded()
    it.engines[2].die("no such folder", fatal=True)
    await settle()
    accepted = it.dispatcher.submit(make_job("alone"))
    assert (await it.given.get())[0] == 1
    it.engines[1].advance(4)
    await accepted.result()
    await it.dispatcher.close()


async def test_engines_of_which_none_loads_are_the_end() -> None:
    it = Crew(2, load=False)
    it.dispatcher.start()
    it.engines[0].die("no such folder", fatal=True)
    await settle()
    it.engines[1].die("no such folder", fatal=True)
    with pytest.raises(StartupError, match="no such folder"):
        await it.dispatcher.loaded()
    await it.dispatcher.close()


async def test_an_engine_that_is_killed_while_it_loads_is_started_again() -> None:
    it = Crew(1, load=False)
    it.dispatcher.start()
    it.engines[0]._load = True
    it.engines[0].die()
    await it.comes_back()
    await it.dispatcher.close()


async def test_too_many_deaths_are_the_end() -> None:
    async with crew(max_restarts=1) as it:
        accepted = it.dispatcher.submit(make_job("last"))
        await it.given.get()
        it.engines[0].die()
        await it.given.get()
        it.engines[0].die()
        assert "2 times in ten minutes" in await it.dispatcher.availability.failed()
        with pytest.raises(GenerationFailed) as caught:
            await accepted.result()
        assert caught.value.reason is Reason.ENGINE_FAILED


async def test_jobs_go_to_the_engine_that_has_the_least_to_do() -> None:
    async with crew(2) as it:
        it.dispatcher.submit(make_job("long", steps=100))
        it.dispatcher.submit(make_job("short", steps=2))
        it.dispatcher.submit(make_job("next", steps=2))
        given = {job.id: index for index, job in [await it.given.get() for _ in range(3)]}
        assert given["short"] == given["next"] != given["long"]


async def test_losing_one_engine_moves_its_jobs_to_the_others() -> None:
    async with crew(2) as it:
        accepted = [it.dispatcher.submit(make_job(id)) for id in "ab"]
        places = {job.id: index for index, job in [await it.given.get() for _ in accepted]}
        assert set(places.values()) == {0, 1}
        it.engines[places["a"]].die()
        index, job = await it.given.get()
        assert (index, job.id) == (places["b"], "a")
        assert it.dispatcher.ready
        it.engines[places["b"]].advance(4)
        for one in accepted:
            await one.result()


async def test_a_cancelled_job_is_not_run_again() -> None:
    async with crew() as it:
        it.dispatcher.submit(make_job("gone"))
        await it.given.get()
        it.dispatcher.cancel("gone")
        it.engines[0].die()
        await it.comes_back()
        assert it.engines[0].jobs == []
        assert it.dispatcher.running_jobs == it.dispatcher.queued_jobs == 0


async def test_a_failure_is_no_crash() -> None:
    async with crew() as it:
        accepted = it.dispatcher.submit(make_job("bad"))
        await it.given.get()
        it.engines[0].fail("bad", Failure(Reason.NON_FINITE, "not a number"))
        with pytest.raises(GenerationFailed):
            await accepted.result()
        assert it.dispatcher.ready
