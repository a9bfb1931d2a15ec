"""Models are read into the host's memory beside loads, with the fake engine."""

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
from darkroom_server.core.catalog import WeightOrigin
from darkroom_server.core.errors import JobCancelled, ModelMemory, ModelUnusable
from darkroom_server.core.model_events import ModelNotLoaded
from darkroom_server.dispatch import ActiveJob, Dispatcher, LoadOutcome
from darkroom_server.dispatch.engines import pool
from darkroom_server.dispatch.engines.handle import EngineHandle
from darkroom_server.dispatch.models.entry import CatalogEntry, LoadPace
from tests.server.clock import Clock
from tests.server.dispatch.harness import SPEED, settle
from tests.server.dispatch.test_host_tier import Seen
from tests.server.jobs import make_job

IDS = ("a", "b", "c", "d", "e")


@asynccontextmanager
async def catalog(
    *, host: int = 500, device: int = 200, **options: Any
) -> AsyncIterator[tuple[Dispatcher, FakeEngine]]:
    """A dispatcher over five models of 100 bytes; loads and reads wait for their ends."""
    models = [replace(fake_model(id), speed=SPEED) for id in IDS]
    engine = FakeEngine(catalogue=models, hold_loads=True)
    dispatcher = Dispatcher(
        [engine],
        IDS,
        max_queued_jobs=64,
        max_resident_samples=8,
        device_memory_budget=device,
        host_memory_budget=host,
        **{"swap_wait": 10.0, **options},
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


async def hold_in_host(dispatcher: Dispatcher, engine: FakeEngine, *models: str) -> None:
    """Let the host's memory hold ``models``, and the device "d" and "e"."""
    for model in (*models, "d", "e"):
        job = submit(dispatcher, model, f"{model}-before")
        await settle()
        engine.finish_read()
        await settle()
        engine.finish_load()
        await settle()
        engine.advance(4)
        await settle()
        assert job.finished
    assert all(states(dispatcher)[model] == "host" for model in models)


def kept_bytes(handle: EngineHandle) -> int:
    """What the host's memory keeps; what is on the device, or will be, is the device's."""
    device = {*handle.models, *([handle.loading.model] if handle.loading is not None else [])}
    return sum(size for id, size in handle.host.items() if id not in device)


async def test_one_model_is_read_while_another_is_loaded() -> None:
    async with catalog() as (dispatcher, engine):
        for id in "abc":
            submit(dispatcher, id)
        assert (engine.reading, engine.loading) == (["a"], [])
        assert states(dispatcher)["a"] == "loading"
        engine.finish_read()
        await settle()
        assert (engine.reading, engine.loading) == (["b"], ["a"])
        engine.finish_read()
        await settle()
        assert (engine.reading, engine.loading) == (["c"], ["a"])
        assert states(dispatcher)["b"] == "host"
        engine.finish_load()
        await settle()
        assert (engine.reading, engine.loading) == (["c"], ["b"])
        assert states(dispatcher)["a"] == "resident"
        dispatcher.cancel("b-job")
        dispatcher.cancel("c-job")
        engine.advance(4)


async def test_without_memory_of_the_host_each_load_waits_for_the_one_before() -> None:
    async with catalog(host=0) as (dispatcher, engine):
        for id in "ab":
            submit(dispatcher, id)
        assert (engine.reading, engine.loading) == ([], ["a"])
        engine.finish_load()
        await settle()
        assert (engine.reading, engine.loading) == ([], ["b"])
        engine.finish_load()
        await settle()
        engine.advance(8)


async def test_a_copy_does_not_wait_for_a_read() -> None:
    async with catalog() as (dispatcher, engine):
        await hold_in_host(dispatcher, engine, "a")
        submit(dispatcher, "c")
        quick = submit(dispatcher, "a")
        assert (engine.reading, engine.loading) == (["c"], ["a"])
        engine.finish_load()
        await settle()
        engine.advance(4)
        await settle()
        assert quick.finished
        assert engine.reading == ["c"]
        engine.finish_read()
        await settle()
        engine.finish_load()
        await settle()
        engine.advance(4)


async def test_a_read_makes_room_for_itself_but_not_at_the_cost_of_waiting_jobs() -> None:
    async with catalog(host=300, device=100) as (dispatcher, engine):
        for model in "abc":
            job = submit(dispatcher, model)
            await settle()
            engine.finish_read()
            await settle()
            engine.finish_load()
            await settle()
            engine.advance(4)
            await settle()
            assert job.finished
        assert [states(dispatcher)[id] for id in "abc"] == ["host", "host", "resident"]
        submit(dispatcher, "d")
        submit(dispatcher, "e")
        await settle()
        assert engine.reading == ["d"]
        engine.finish_read()
        await settle()
        (handle,) = dispatcher._pool.engines
        assert kept_bytes(handle) <= 300
        assert handle.has_in_host("d")
        while not all(job.ended for job in dispatcher._registry.all()):
            if engine.reading:
                engine.finish_read()
            await settle()
            if engine.loading:
                engine.finish_load()
            await settle()
            engine.advance(4)
            await settle()
            assert kept_bytes(handle) <= 300


@pytest.mark.parametrize("why", ["packed", "no memory"])
async def test_a_model_that_the_host_cannot_take_is_loaded_from_its_files(why: str) -> None:
    async with catalog() as (dispatcher, engine):
        job = submit(dispatcher, "a")
        if why == "packed":
            engine.finish_read(host_bytes=0)
        else:
            engine.reading.remove("a")
            engine._emit(ModelNotLoaded(model="a", reason="too large", out_of_memory=True))
        await settle()
        assert (engine.reading, engine.loading) == ([], ["a"])
        submit(dispatcher, "b")
        await settle()
        assert engine.reading == [], "the disk is busy"
        engine.finish_load()
        await settle()
        assert engine.reading == ["b"]
        engine.advance(4)
        await settle()
        assert job.finished
        engine.finish_read()
        await settle()
        engine.finish_load()
        await settle()
        engine.advance(4)


async def test_a_failed_read_is_the_models_fault() -> None:
    seen = Seen()
    async with catalog(observer=seen) as (dispatcher, engine):
        engine.failing["a"] = "its folder is gone"
        failing, fine = submit(dispatcher, "a"), submit(dispatcher, "b")
        engine.finish_read()
        await settle()
        assert isinstance(failing.error, ModelUnusable)
        assert "its folder is gone" in str(failing.error)
        assert states(dispatcher)["a"] == "failed"
        assert (engine.reading, engine.loading) == (["b"], [])
        engine.finish_read()
        await settle()
        engine.finish_load()
        await settle()
        engine.advance(4)
        await settle()
        assert fine.finished
        (handle,) = dispatcher._pool.engines
        assert "a" not in handle.host
    assert [(end.model, end.origin, end.outcome) for end in seen.loads] == [
        ("a", WeightOrigin.DISK, LoadOutcome.FAILED),
        ("b", WeightOrigin.DISK, LoadOutcome.LOADED),
        ("b", WeightOrigin.HOST, LoadOutcome.LOADED),
    ]


async def revived(dispatcher: Dispatcher, restarts: int) -> None:
    async with asyncio.timeout(30):
        while (engine := dispatcher.snapshot().engines[0]).restarts < restarts or not engine.ready:
            await asyncio.sleep(0)
    await settle()


async def test_after_a_death_in_two_loads_each_is_tried_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whose fault the first death was is not known: only one of the two fails."""
    monkeypatch.setattr(pool, "FIRST_BACKOFF_SECONDS", 0.001)
    async with catalog() as (dispatcher, engine):
        fine, poison = submit(dispatcher, "a"), submit(dispatcher, "b")
        engine.finish_read()
        await settle()
        assert (engine.reading, engine.loading) == (["b"], ["a"])
        engine.die()
        await revived(dispatcher, 1)
        assert not fine.ended
        assert not poison.ended
        restarts = 1
        for _ in range(6):
            assert len(engine.reading) + len(engine.loading) <= 1, "alone"
            if "b" in (*engine.reading, *engine.loading):
                engine.die()
                restarts += 1
                await revived(dispatcher, restarts)
                break
            if engine.reading:
                engine.finish_read()
            elif engine.loading:
                engine.finish_load()
            await settle()
        assert isinstance(poison.error, ModelUnusable)
        assert "2 engines died" in dispatcher.models.status("b").reason
        for _ in range(4):
            if engine.reading:
                engine.finish_read()
            await settle()
            if engine.loading:
                engine.finish_load()
            await settle()
            engine.advance(4)
            await settle()
        assert fine.finished


async def test_reads_do_not_keep_the_disk_from_a_load_that_is_due(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    async with catalog() as (dispatcher, engine):
        (handle,) = dispatcher._pool.engines
        handle.files_only.add("a")
        submit(dispatcher, "b")
        submit(dispatcher, "a")
        submit(dispatcher, "c")
        assert (engine.reading, engine.loading) == (["b"], []), "the disk is busy"
        engine.finish_read()
        await settle()
        assert (engine.reading, engine.loading) == (["c"], ["b"]), "it is not due"
        submit(dispatcher, "d")
        clock.skip(11.0)
        engine.finish_read()
        await settle()
        assert engine.reading == [], "the disk is for the one that is due"
        engine.finish_load()
        await settle()
        assert (engine.reading, engine.loading) == ([], ["a"])
        while dispatcher.counts.live:
            if engine.reading:
                engine.finish_read()
            if engine.loading:
                engine.finish_load()
            engine.advance(4)
            await settle()


def test_a_read_and_a_copy_make_a_load() -> None:
    pace = LoadPace()
    entry, other = CatalogEntry("a", weight_bytes=100), CatalogEntry("b", weight_bytes=200)
    pace.record(entry, 0.5, WeightOrigin.HOST)
    pace.record_read(entry, 3.0)
    assert (pace.expected(entry), pace.expected(entry, in_host=True)) == (3.5, 0.5)
    assert (pace.expected(other), pace.expected(other, in_host=True)) == (7.0, 1.0)
    pace.record(entry, 0.7, WeightOrigin.HOST)
    assert pace.expected(entry) == pytest.approx(3.7)
    pace.record(entry, 5.0, WeightOrigin.DISK)
    assert pace.expected(entry) == 5.0


async def test_an_estimate_counts_the_read_and_the_copy() -> None:
    async with catalog() as (dispatcher, engine):
        await hold_in_host(dispatcher, engine, "a")
        entries = dispatcher.models._states.entries
        for entry in entries.values():
            entry.read_seconds, entry.host_seconds = 4.0, 1.0
        loaded = dispatcher.models.seconds_until_loaded
        copied = loaded(ActiveJob(make_job("x", model="a"), fake_model("a")))["a"]
        read = loaded(ActiveJob(make_job("y", model="b"), fake_model("b")))["b"]
        assert copied == pytest.approx(1.0)
        assert read == pytest.approx(5.0)
        submit(dispatcher, "b")
        assert engine.reading == ["b"]
        beside = loaded(ActiveJob(make_job("z", model="a"), fake_model("a")))
        assert beside["a"] == pytest.approx(1.0, abs=0.1), "not behind the read"
        behind = loaded(ActiveJob(make_job("w", model="c"), fake_model("c")))
        assert behind["c"] == pytest.approx(9.0, abs=0.2), "behind the read of another"
        engine.finish_read()
        await settle()
        engine.finish_load()
        await settle()
        engine.advance(4)


actions = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.sampled_from(IDS)),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("unload"), st.sampled_from(IDS)),
        st.tuples(st.sampled_from(["load", "read", "full", "batch", "fail"]), st.none()),
    ),
    max_size=40,
)


@settings(max_examples=100, deadline=None)
@given(actions, st.sampled_from([100, 200]), st.sampled_from([100, 300, 500]))
def test_whatever_happens_both_budgets_hold_and_every_job_ends(
    actions: list[tuple[str, Any]], device: int, host: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        asyncio.run(_run(actions, device, host, Clock(patch)))


async def _run(actions: list[tuple[str, Any]], device: int, host: int, clock: Clock) -> None:
    jobs: list[ActiveJob] = []
    cancelled: set[str] = set()
    async with catalog(device=device, host=host) as (dispatcher, engine):
        (handle,) = dispatcher._pool.engines

        async def check() -> None:
            await settle()
            assert (len(engine.models) + len(engine.loading)) * 100 <= device
            assert len(engine.loading) <= 1
            assert len(engine.reading) <= 1
            assert not {*engine.reading} & {*engine.loading}
            assert kept_bytes(handle) <= host
            assert engine._in_host - {*engine.loading} <= {
                *handle.host,
                *(model.id for model in engine.models),
            }

        for action, what in actions:
            match action:
                case "submit" if states(dispatcher)[what] != "failed":
                    jobs.append(submit(dispatcher, what, f"job-{len(jobs)}"))
                case "cancel" if what < len(jobs):
                    dispatcher.cancel(f"job-{what}")
                    cancelled.add(f"job-{what}")
                    engine.advance(0)
                case "unload":
                    dispatcher.unload_model(what)
                case "load" if engine.loading:
                    engine.finish_load()
                case "read" if engine.reading:
                    engine.finish_read()
                case "full" if engine.reading:
                    engine.finish_read(host_bytes=0)
                case "fail" if engine.reading:
                    engine.failing[engine.reading[0]] = "it is damaged"
                    engine.finish_read()
                    engine.failing.clear()
                case "batch":
                    engine.advance(1)
                    clock.skip(1.0)
            await check()
        for _ in range(200):
            if engine.loading:
                engine.finish_load()
            if engine.reading:
                engine.finish_read()
            engine.advance(1)
            clock.skip(1.0)
            await check()
            if all(job.ended for job in jobs):
                break
        assert all(job.ended for job in jobs)
        for job in jobs:
            match job.error:
                case JobCancelled():
                    assert job.job.id in cancelled
                case error:
                    assert error is None or isinstance(error, ModelMemory | ModelUnusable), error
