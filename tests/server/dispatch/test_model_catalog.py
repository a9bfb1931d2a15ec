"""Models that are loaded when jobs name them, and unloaded for others, with the fake engine."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darkroom_server.backends.fake import FakeEngine
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.catalog import ModelState
from darkroom_server.core.errors import DarkroomError, ModelMemory, ModelUnusable, UnknownModel
from darkroom_server.dispatch import ActiveJob, Dispatcher
from darkroom_server.dispatch.engines import pool
from tests.server.dispatch.harness import SPEED, settle
from tests.server.jobs import make_job

IDS = ("a", "b", "c")


def models(*ids: str) -> list[Any]:
    return [replace(fake_model(id), speed=SPEED) for id in ids]


@asynccontextmanager
async def catalog(
    engine: FakeEngine | None = None,
    *,
    budget: int | None = 100,
    pinned: tuple[str, ...] = (),
    **fake: Any,
) -> AsyncIterator[tuple[Dispatcher, FakeEngine]]:
    """A dispatcher over the models "a", "b" and "c" of 100 bytes; ``pinned`` are loaded."""
    rest = [id for id in IDS if id not in pinned]
    engine = engine or FakeEngine(models(*pinned), catalogue=models(*rest), **fake)
    dispatcher = Dispatcher(
        [engine],
        IDS,
        max_queued_jobs=64,
        max_resident_samples=4,
        pinned_models=pinned,
        device_memory_budget=budget,
    )
    dispatcher.start()
    await dispatcher.loaded()
    yield dispatcher, engine
    engine.failing.clear()
    await dispatcher.close()
    assert dispatcher.counts.live == 0


def submit(dispatcher: Dispatcher, model: str, id: str = "", **fields: Any) -> ActiveJob:
    return dispatcher.submit(make_job(id or f"{model}-job", model=model, **fields))


def states(dispatcher: Dispatcher) -> dict[str, str]:
    return {id: dispatcher.models.status(id).state.value for id in IDS}


async def revived(dispatcher: Dispatcher, restarts: int) -> None:
    """Wait until the engine was started again so often, and is ready."""
    async with asyncio.timeout(30):
        while (engine := dispatcher.snapshot().engines[0]).restarts < restarts or not engine.ready:
            await asyncio.sleep(0)
    await settle()


async def test_a_job_loads_its_model_and_runs() -> None:
    async with catalog(hold_loads=True) as (dispatcher, engine):
        assert dispatcher.ready
        assert states(dispatcher) == dict.fromkeys(IDS, "available")
        job = submit(dispatcher, "b")
        assert engine.loading == ["b"]
        assert states(dispatcher)["b"] == "loading"
        status = dispatcher.models.status("b")
        assert status.load is not None
        assert status.last_used is not None
        assert (job.position, engine.jobs) == (0, [])
        engine.finish_load()
        await settle()
        assert states(dispatcher) == {"a": "available", "b": "resident", "c": "available"}
        assert [each.id for each in engine.jobs] == ["b-job"]
        engine.advance(4)
        await settle()
        assert job.finished


async def test_two_models_take_turns_under_a_budget_of_one() -> None:
    async with catalog() as (dispatcher, engine):
        jobs = [submit(dispatcher, id, f"{id}{n}") for n in range(2) for id in "ab"]
        await settle()
        assert {each.model for each in engine.jobs} == {"a"}
        engine.advance(4)
        await settle()
        assert engine.unloaded == ["a"]
        assert {each.model for each in engine.jobs} == {"b"}
        engine.advance(4)
        await settle()
        assert all(job.finished for job in jobs)
        assert engine.loaded == ["a", "b"]


async def test_new_jobs_do_not_keep_a_model_that_makes_room() -> None:
    async with catalog() as (dispatcher, engine):
        submit(dispatcher, "a", "first")
        await settle()
        waits = submit(dispatcher, "b")
        later = submit(dispatcher, "a", "later", submitted_at=waits.job.submitted_at + 1.0)
        await settle()
        assert [each.id for each in engine.jobs] == ["first"]
        engine.advance(4)
        await settle()
        assert [each.id for each in engine.jobs] == ["b-job"]
        engine.advance(4)
        await settle()
        assert [each.id for each in engine.jobs] == ["later"]
        engine.advance(4)
        await settle()
        assert later.finished
        assert engine.loaded == ["a", "b", "a"]


async def test_a_model_stays_if_the_job_that_wanted_another_is_cancelled() -> None:
    async with catalog() as (dispatcher, engine):
        submit(dispatcher, "a", "first")
        await settle()
        waits = submit(dispatcher, "b")
        submit(dispatcher, "a", "later", submitted_at=waits.job.submitted_at + 1.0)
        dispatcher.cancel("b-job")
        await settle()
        engine.advance(4)
        await settle()
        engine.advance(4)
        await settle()
        assert engine.loaded == ["a"]
        assert dispatcher.counts.live == 0


async def test_a_pinned_model_stays_and_the_job_of_another_fails() -> None:
    async with catalog(pinned=("a",)) as (dispatcher, engine):
        job = submit(dispatcher, "b")
        assert isinstance(job.error, ModelMemory)
        with pytest.raises(ModelMemory, match="a must stay"):
            await dispatcher.load_model("b")
        await dispatcher.pin_model("a", pinned=False)
        await dispatcher.load_model("b")
        assert engine.unloaded == ["a"]
        await dispatcher.pin_model("b", pinned=True)
        with pytest.raises(ModelMemory):
            await dispatcher.pin_model("a", pinned=True)
        assert not dispatcher.models.status("a").pinned


async def test_a_model_that_cannot_be_loaded_fails_its_jobs_and_no_others() -> None:
    async with catalog(hold_loads=True, budget=None) as (dispatcher, engine):
        engine.failing["a"] = "its unet is cut short"
        broken, fine = submit(dispatcher, "a"), submit(dispatcher, "b")
        engine.finish_load()
        await settle()
        assert isinstance(broken.error, ModelUnusable)
        assert dispatcher.models.status("a").reason == "its unet is cut short"
        with pytest.raises(ModelUnusable, match="cut short"):
            submit(dispatcher, "a", "again")
        engine.finish_load()
        await settle()
        engine.advance(4)
        await settle()
        assert fine.finished
        engine.failing.clear()
        again = asyncio.create_task(dispatcher.load_model("a"))
        await settle()
        engine.finish_load()
        await again
        assert states(dispatcher)["a"] == "resident"


async def test_a_model_is_unloaded_once_its_jobs_have_ended() -> None:
    async with catalog(pinned=("a",)) as (dispatcher, engine):
        submit(dispatcher, "a")
        await settle()
        assert dispatcher.unload_model("a") == 1
        assert engine.unloaded == []
        engine.advance(4)
        await settle()
        assert engine.unloaded == ["a"]
        assert states(dispatcher)["a"] == "available"
        assert not dispatcher.models.status("a").pinned
        submit(dispatcher, "a", "again")
        await settle()
        assert states(dispatcher)["a"] == "resident"
        engine.advance(4)
        await settle()
        with pytest.raises(UnknownModel):
            dispatcher.unload_model("z")
        with pytest.raises(UnknownModel):
            await dispatcher.load_model("/a/path")


async def test_two_deaths_during_a_load_are_the_models_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "FIRST_BACKOFF_SECONDS", 0.0)
    async with catalog(hold_loads=True, budget=None) as (dispatcher, engine):
        running = submit(dispatcher, "b")
        engine.finish_load()
        await settle()
        engine.advance(1)
        broken = submit(dispatcher, "a")
        for death in (1, 2):
            assert engine.loading == ["a"]
            assert broken.error is None
            engine.die()
            await revived(dispatcher, death)
            if engine.loading == ["b"]:
                engine.finish_load()
                await settle()
        assert isinstance(broken.error, ModelUnusable)
        assert "2 engines died" in dispatcher.models.status("a").reason
        assert running.crashes == 0
        engine.advance(4)
        await settle()
        assert running.finished


async def test_a_pinned_model_is_loaded_again_after_a_death(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "FIRST_BACKOFF_SECONDS", 0.0)
    async with catalog() as (dispatcher, engine):
        await dispatcher.pin_model("c", pinned=True)
        engine.die()
        await revived(dispatcher, 1)
        assert states(dispatcher)["c"] == "resident"
        assert engine.loaded == ["c", "c"]


async def test_an_estimate_has_the_load() -> None:
    async with catalog(hold_loads=True) as (dispatcher, engine):
        cold = dispatcher.estimate(make_job("probe", model="a"))
        assert cold is not None
        loading = asyncio.create_task(dispatcher.load_model("a"))
        await settle()
        engine.finish_load()
        await loading
        warm = dispatcher.estimate(make_job("probe", model="a"))
        assert warm is not None
        assert cold.total > warm.total + 1.5
        assert cold.queue_wait > 1.5 > warm.queue_wait


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("submit"), st.sampled_from(IDS)),
            st.tuples(st.just("cancel"), st.integers(0, 30)),
            st.tuples(st.just("unload"), st.sampled_from(IDS)),
            st.tuples(st.sampled_from(["pin", "unpin"]), st.sampled_from(IDS)),
            st.tuples(st.sampled_from(["load", "batch"]), st.none()),
        ),
        max_size=40,
    ),
    st.sampled_from([100, 200]),
)
def test_whatever_happens_the_budget_holds_and_every_job_ends(
    actions: list[tuple[str, Any]], budget: int
) -> None:
    asyncio.run(_run(actions, budget))


async def _run(actions: list[tuple[str, Any]], budget: int) -> None:
    jobs: list[ActiveJob] = []
    calls: list[asyncio.Task[None]] = []
    async with catalog(hold_loads=True, budget=budget) as (dispatcher, engine):

        async def check() -> None:
            await settle()
            held = len(engine.models) + len(engine.loading)
            assert held * 100 <= budget
            assert len(engine.loading) <= 1
            # The fake engine asserts that nothing with jobs is unloaded.

        for action, what in actions:
            match action:
                case "submit":
                    jobs.append(submit(dispatcher, what, f"job-{len(jobs)}"))
                case "cancel" if what < len(jobs):
                    dispatcher.cancel(f"job-{what}")
                    engine.advance(0)
                case "unload":
                    dispatcher.unload_model(what)
                case "pin":
                    call = dispatcher.pin_model(what, pinned=True)
                    calls.append(asyncio.create_task(call))
                case "unpin":
                    await dispatcher.pin_model(what, pinned=False)
                case "load" if engine.loading:
                    engine.finish_load()
                case "batch":
                    engine.advance(1)
            pinned = {id for id in IDS if dispatcher.models.status(id).pinned}
            resident = {model.id for model in engine.models}
            await check()
            still = {model.id for model in engine.models}
            assert not (resident - still) & pinned
        for id in IDS:
            await dispatcher.pin_model(id, pinned=False)
        for _ in range(200):
            if engine.loading:
                engine.finish_load()
            engine.advance(1)
            await check()
            if all(job.ended for job in jobs) and all(call.done() for call in calls):
                break
        assert all(job.ended for job in jobs)
        assert all(
            job.finished or (job.error is not None and isinstance(job.error, DarkroomError))
            for job in jobs
        )
        for task in calls:
            assert task.done()
            error = task.exception()
            assert error is None or isinstance(error, ModelMemory | ModelUnusable)
        assert set(states(dispatcher).values()) <= {
            ModelState.AVAILABLE.value,
            ModelState.RESIDENT.value,
        }
