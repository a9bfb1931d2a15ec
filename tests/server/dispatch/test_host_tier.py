"""Models that leave the device stay in the host's memory, within a budget, by what that saves."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from darkroom_server.backends.fake import FakeEngine
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.catalog import WeightOrigin
from darkroom_server.core.errors import ModelMemory
from darkroom_server.core.events import Event
from darkroom_server.core.model_events import ModelNotLoaded
from darkroom_server.dispatch import Dispatcher, LoadOutcome, ModelLoadEnded, Observer, TierBytes
from darkroom_server.dispatch.models.entry import CatalogEntry, LoadPace
from darkroom_server.dispatch.models.host_tier import HostModel, models_to_drop
from tests.server.dispatch.harness import SPEED, settle
from tests.server.jobs import make_job

IDS = ("a", "b", "c")


class Seen(Observer):
    """Keeps the ends of loads, and what the engine held last."""

    def __init__(self) -> None:
        self.loads: list[ModelLoadEnded] = []
        self.tiers: dict[str, int] = {}

    def on_event(self, event: Event | Any) -> None:
        if isinstance(event, ModelLoadEnded):
            self.loads.append(event)
        if isinstance(event, TierBytes):
            self.tiers = dict(event.by_tier)


@asynccontextmanager
async def catalog(
    *, host: int, device: int = 100, seen: Observer | None = None, **fake: Any
) -> AsyncIterator[tuple[Dispatcher, FakeEngine]]:
    """A dispatcher over "a", "b" and "c" of 100 bytes each, with both budgets."""
    models = [replace(fake_model(id), speed=SPEED) for id in IDS]
    engine = FakeEngine(catalogue=models, **fake)
    dispatcher = Dispatcher(
        [engine],
        IDS,
        max_queued_jobs=64,
        max_resident_samples=4,
        device_memory_budget=device,
        host_memory_budget=host,
        observer=seen,
    )
    dispatcher.start()
    await dispatcher.loaded()
    yield dispatcher, engine
    await dispatcher.close()


async def use(dispatcher: Dispatcher, engine: FakeEngine, model: str) -> None:
    """Load ``model`` by a job, and run that."""
    job = dispatcher.submit(make_job(f"{model}-{dispatcher.counts.accepted}", model=model))
    await settle()
    engine.advance(4)
    await settle()
    assert job.finished


def states(dispatcher: Dispatcher) -> dict[str, str]:
    return {id: dispatcher.models.status(id).state.value for id in IDS}


async def test_an_evicted_model_stays_in_the_hosts_memory_and_comes_back_from_there() -> None:
    seen = Seen()
    async with catalog(host=100, seen=seen) as (dispatcher, engine):
        await use(dispatcher, engine, "a")
        assert seen.tiers == {"device": 100, "host": 0}
        await use(dispatcher, engine, "b")
        assert states(dispatcher) == {"a": "host", "b": "resident", "c": "available"}
        assert seen.tiers == {"device": 100, "host": 100}
        await use(dispatcher, engine, "a")
        assert states(dispatcher) == {"a": "resident", "b": "host", "c": "available"}
    assert [(load.model, load.origin) for load in seen.loads] == [
        # Each is read into the host's memory, and copied from there.
        ("a", WeightOrigin.DISK),
        ("a", WeightOrigin.HOST),
        ("b", WeightOrigin.DISK),
        ("b", WeightOrigin.HOST),
        ("a", WeightOrigin.HOST),
    ]
    assert {load.outcome for load in seen.loads} == {LoadOutcome.LOADED}


async def test_without_a_budget_nothing_stays() -> None:
    async with catalog(host=0) as (dispatcher, engine):
        await use(dispatcher, engine, "a")
        await use(dispatcher, engine, "b")
        assert states(dispatcher) == {"a": "available", "b": "resident", "c": "available"}


async def test_the_host_keeps_what_is_asked_for_most() -> None:
    async with catalog(host=100) as (dispatcher, engine):
        for model in "aaab":
            await use(dispatcher, engine, model)
        assert states(dispatcher)["a"] == "host"
        await use(dispatcher, engine, "c")
        assert states(dispatcher) == {"a": "host", "b": "available", "c": "resident"}
        for _ in range(4):
            await use(dispatcher, engine, "c")
        await use(dispatcher, engine, "b")
        assert states(dispatcher) == {"a": "available", "b": "resident", "c": "host"}


async def test_an_unload_by_hand_frees_the_hosts_memory_too() -> None:
    async with catalog(host=200) as (dispatcher, engine):
        await use(dispatcher, engine, "a")
        await use(dispatcher, engine, "b")
        assert states(dispatcher)["a"] == "host"
        assert dispatcher.unload_model("a") == 0
        assert dispatcher.unload_model("b") == 0
        await settle()
        assert set(states(dispatcher).values()) == {"available"}
        assert engine._in_host == set()


async def test_a_new_engine_holds_nothing_in_the_hosts_memory() -> None:
    async with catalog(host=100) as (dispatcher, engine):
        await use(dispatcher, engine, "a")
        await use(dispatcher, engine, "b")
        assert states(dispatcher)["a"] == "host"
        engine.become_ready()
        await settle()
        assert states(dispatcher)["a"] == "available"


def run_out_of_memory(engine: FakeEngine) -> None:
    """Let the load that began first fail: the device has too little memory."""
    id = engine.loading.pop(0)
    engine._emit(ModelNotLoaded(model=id, reason="it needs 7 bytes", out_of_memory=True))


async def load(dispatcher: Dispatcher, engine: FakeEngine, id: str) -> None:
    call = asyncio.create_task(dispatcher.load_model(id))
    while not engine.loading:
        await asyncio.sleep(0)
        if engine.reading:
            engine.finish_read()
    engine.finish_load()
    await call


async def test_a_load_without_memory_is_tried_again_after_others_have_left() -> None:
    """First what the host's memory holds, which is the device's; then a model that is idle."""
    async with catalog(host=100, device=200, hold_loads=True) as (dispatcher, engine):
        for id in IDS:
            await load(dispatcher, engine, id)
        assert states(dispatcher) == {"a": "host", "b": "resident", "c": "resident"}
        job = dispatcher.submit(make_job("again", model="a"))
        await settle()
        # "b" has made room, and would have stayed in the host's memory in place of "a".
        assert engine.loading == ["a"]
        freed = len(engine.unloaded)
        for _ in range(2):
            run_out_of_memory(engine)
            await settle()
            assert engine.loading == ["a"], "it is tried again"
            assert len(engine.unloaded) > freed
            freed = len(engine.unloaded)
        engine.finish_load()
        await settle()
        engine.advance(4)
        await settle()
        assert job.finished


async def test_a_load_without_memory_fails_once_nothing_can_leave() -> None:
    async with catalog(host=0, hold_loads=True) as (dispatcher, engine):
        job = dispatcher.submit(make_job("alone", model="a"))
        await settle()
        run_out_of_memory(engine)
        await settle()
        assert isinstance(job.error, ModelMemory)
        assert "it needs 7 bytes" in str(job.error)
        assert states(dispatcher)["a"] == "available"


held = st.dictionaries(
    st.sampled_from("abcdef"),
    st.builds(HostModel, st.integers(1, 50), st.floats(0, 10)),
    max_size=6,
)


@given(st.builds(HostModel, st.integers(1, 50), st.floats(0, 10)), held, st.integers(0, 150))
def test_the_budget_holds_and_no_more_is_lost_than_is_gained(
    new: HostModel, held: dict[str, HostModel], budget: int
) -> None:
    dropped = models_to_drop(new, held, budget)
    if dropped is None:
        free = budget - sum(each.bytes for each in held.values())
        assert new.bytes > free, "what fits is kept"
        return
    rest = sum(each.bytes for id, each in held.items() if id not in dropped)
    assert rest + new.bytes <= budget
    assert sum(held[id].value for id in dropped) <= new.value


def test_loads_from_the_host_and_from_files_have_their_own_pace() -> None:
    pace = LoadPace()
    known, unknown = CatalogEntry("a", weight_bytes=100), CatalogEntry("b", weight_bytes=200)
    assert pace.expected(unknown, in_host=True) < pace.expected(unknown)
    pace.record(known, 4.0, WeightOrigin.DISK)
    pace.record(known, 0.5, WeightOrigin.HOST)
    assert (pace.expected(known), pace.expected(known, in_host=True)) == (4.0, 0.5)
    assert (pace.expected(unknown), pace.expected(unknown, in_host=True)) == (8.0, 1.0)
    pace.record(known, 6.0, WeightOrigin.HUB)
    assert pace.expected(known) == 6.0
    assert pace.expected(known, in_host=True) == 0.5
