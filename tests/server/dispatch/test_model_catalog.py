"""Models that are loaded when jobs name them, and unloaded for others, with the fake engine."""

import asyncio
import time
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
from darkroom_server.core.errors import (
    DarkroomError,
    DeadlineUnreachable,
    ModelMemory,
    ModelUnusable,
    UnknownModel,
)
from darkroom_server.dispatch import ActiveJob, Dispatcher
from darkroom_server.dispatch.engines import pool
from darkroom_server.dispatch.engines.handle import EngineHandle
from tests.server.clock import Clock
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
    swap_wait: float = 10.0,
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
        swap_wait=swap_wait,
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


async def test_a_deadline_that_only_the_load_passes_is_rejected_at_once(clock: Clock) -> None:
    """The run alone takes 4.5 seconds, and the first load of any model about two."""
    clock.stop()
    async with catalog(hold_loads=True) as (dispatcher, engine):
        with pytest.raises(DeadlineUnreachable) as caught:
            submit(dispatcher, "a", deadline=time.monotonic() + 4.5)
        figures = {key: float(value) for key, value in caught.value.metadata.items()}
        assert figures["run_seconds"] == pytest.approx(4.5)
        assert figures["queue_wait_seconds"] == pytest.approx(2.0, abs=0.1)
        assert engine.loading == [], "nothing is loaded for it"
        assert dispatcher.counts.accepted == 0
        loading = asyncio.create_task(dispatcher.load_model("a"))
        await settle()
        engine.finish_load()
        await loading
        kept = submit(dispatcher, "a", deadline=time.monotonic() + 4.5)
        await settle()
        engine.advance(4)
        await settle()
        assert kept.finished


async def make_hot(dispatcher: Dispatcher, engine: FakeEngine, model: str) -> EngineHandle:
    """Let many jobs of a model come, of which the last one runs; returns the engine's handle."""
    for n in range(40):
        submit(dispatcher, model, f"{model}-{n}")
        await settle()
        if n < 39:
            engine.advance(4)
            await settle()
    assert [job.id for job in engine.jobs] == [f"{model}-39"]
    (handle,) = dispatcher._pool.engines
    return handle


async def test_a_job_waits_until_its_model_pays_for_the_swap(clock: Clock) -> None:
    clock.stop()
    async with catalog(swap_wait=30.0) as (dispatcher, engine):
        handle = await make_hot(dispatcher, engine, "a")
        waiting = [submit(dispatcher, "b", "b0")]
        later = submit(dispatcher, "a", "later", submitted_at=time.monotonic() + 1.0)
        await settle()
        assert [job.id for job in engine.jobs] == ["a-39", "later"], "its model is in memory"
        second = dispatcher.estimate(make_job("probe", model="b"))
        assert second is not None
        assert second.queue_wait > 20.0, "it counts the wait for a swap that does not pay"
        while not handle.making_room_for:
            waiting.append(submit(dispatcher, "b", f"b{len(waiting)}"))
            await settle()
        assert 2 < len(waiting) < 16
        behind = submit(dispatcher, "a", "behind", submitted_at=time.monotonic() + 1.0)
        await settle()
        assert len(engine.jobs) == 2, "the model makes room"
        engine.advance(4)
        await settle()
        assert later.finished
        assert engine.loaded == ["a", "b"]
        assert {job.model for job in engine.jobs} == {"b"}
        for _ in range(6):
            engine.advance(4)
            clock.skip(2.0)
            await settle()
        assert all(job.finished for job in (*waiting, behind))
        assert engine.loaded == ["a", "b", "a"]


@pytest.mark.parametrize("deadline", [None, 40.0])
async def test_a_swap_that_does_not_pay_is_made_when_it_is_due(
    clock: Clock, deadline: float | None
) -> None:
    """That is after ``swap_wait``, or earlier for a deadline; a load takes a second."""
    clock.stop()
    async with catalog(swap_wait=60.0) as (dispatcher, engine):
        handle = await make_hot(dispatcher, engine, "a")
        at = None if deadline is None else time.monotonic() + deadline
        job = submit(dispatcher, "b", deadline=at)
        assert job.estimate is not None
        due = 60.0 if deadline is None else deadline - 1.5 * job.estimate.run_time
        clock.skip(1.0)
        others = [submit(dispatcher, "a", f"more-{n}") for n in range(5)]
        assert dispatcher.queued_jobs == 1 + 2
        clock.skip(due - 2.1)
        await settle()
        assert handle.leaving == set()
        clock.skip(0.2)
        await settle()
        assert handle.making_room_for == "b"
        engine.advance(4)
        await settle()
        assert engine.loaded == ["a", "b"]
        for _ in range(4):
            engine.advance(4)
            clock.skip(20.0)
            await settle()
        assert all(each.finished for each in (job, *others))


@asynccontextmanager
async def two_engines(budget: int = 100) -> AsyncIterator[tuple[Dispatcher, list[FakeEngine]]]:
    engines = [FakeEngine(catalogue=models(*IDS)) for _ in range(2)]
    dispatcher = Dispatcher(
        engines, IDS, max_queued_jobs=9, max_resident_samples=4, device_memory_budget=budget
    )
    dispatcher.start()
    await dispatcher.loaded()
    await settle()
    yield dispatcher, engines
    await dispatcher.close()
    assert dispatcher.counts.live == 0


async def test_a_job_goes_to_the_engine_that_has_its_model() -> None:
    async with two_engines() as (dispatcher, engines):
        for id in "ab":
            submit(dispatcher, id, f"{id}0")
            await settle()
        (first,), (second,) = (engine.loaded for engine in engines)
        assert {first, second} == {"a", "b"}
        for n in range(1, 3):
            for id in "ab":
                submit(dispatcher, id, f"{id}{n}")
                await settle()
        for engine, model in zip(engines, (first, second), strict=True):
            assert engine.loaded == [model]
            assert [job.model for job in engine.jobs] == [model] * 3
            engine.advance(4)
        await settle()


async def test_a_hot_model_is_loaded_by_another_engine_when_the_first_one_is_full() -> None:
    async with two_engines() as (dispatcher, engines):
        jobs = [submit(dispatcher, "a", f"a{n}") for n in range(4)]
        await settle()
        assert [engine.loaded for engine in engines] == [["a"], []]
        jobs += [submit(dispatcher, "a", f"a{n}") for n in range(4, 6)]
        await settle()
        assert [engine.loaded for engine in engines] == [["a"], ["a"]]
        assert [len(engine.jobs) for engine in engines] == [4, 2]
        # A copy makes room for a model that no engine has.
        other = submit(dispatcher, "b")
        for engine in engines:
            engine.advance(4)
        await settle()
        assert all(job.finished for job in jobs)
        assert sorted(engine.loaded[-1] for engine in engines) == ["a", "b"]
        for engine in engines:
            engine.advance(4)
        await settle()
        assert other.finished


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
    with pytest.MonkeyPatch.context() as patch:
        asyncio.run(_run(actions, budget, Clock(patch)))


async def _run(actions: list[tuple[str, Any]], budget: int, clock: Clock) -> None:
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
                    clock.skip(1.0)
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
            clock.skip(1.0)
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
