"""Models that leave the device stay in the host's memory, within a budget, by what that saves."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darkroom_server.backends.fake import FakeEngine
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.catalog import ModelDescription, WeightOrigin
from darkroom_server.core.errors import ModelMemory
from darkroom_server.core.events import Event
from darkroom_server.core.model_events import ModelLoad, ModelNotLoaded, ModelsDescribed
from darkroom_server.dispatch import Dispatcher, LoadOutcome, ModelLoadEnded, Observer, TierBytes
from darkroom_server.dispatch.models.entry import CatalogEntry, LoadPace
from darkroom_server.dispatch.models.host_tier import HostModel, models_to_drop
from darkroom_server.dispatch.models.residency import held_bytes
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
    *,
    host: int,
    device: int = 100,
    seen: Observer | None = None,
    kind: type[FakeEngine] = FakeEngine,
    **fake: Any,
) -> AsyncIterator[tuple[Dispatcher, FakeEngine]]:
    """A dispatcher over "a", "b" and "c" of 100 bytes each, with both budgets."""
    models = [replace(fake_model(id), speed=SPEED) for id in IDS]
    engine = kind(catalogue=models, **fake)
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


ENCODER = {"encoder": 40}


class Sharing(FakeEngine):
    """An engine whose models have a component in common."""

    def _load_of(self, id: str) -> ModelLoad:
        return replace(super()._load_of(id), shared=ENCODER)


@pytest.mark.parametrize("shares", [True, False])
async def test_what_models_share_counts_once_within_the_budget(shares: bool) -> None:
    seen, kind = Seen(), Sharing if shares else FakeEngine
    async with catalog(host=160, seen=seen, kind=kind) as (dispatcher, engine):
        for entry in dispatcher.models._states.entries.values():
            entry.shared = ENCODER if shares else {}  # As an earlier load found.
        for model in IDS:
            await use(dispatcher, engine, model)
        held = [id for id, state in states(dispatcher).items() if state == "host"]
        assert len(held) == (2 if shares else 1)
        assert seen.tiers == {"device": 100, "host": 160 if shares else 100}


async def test_a_new_description_forgets_what_other_files_shared() -> None:
    async with catalog(host=0, kind=Sharing) as (dispatcher, engine):
        await use(dispatcher, engine, "a")
        entry = dispatcher.models._states.entries["a"]
        assert entry.shared == ENCODER
        await use(dispatcher, engine, "b")
        for stamp, shared in ((entry.stamp, ENCODER), ("other", {})):
            described = ModelDescription(id="a", info=fake_model("a"), weight_bytes=7, stamp=stamp)
            engine._emit(ModelsDescribed((described,)))
            await settle()
            assert (entry.weight_bytes, entry.shared) == (7, shared)


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


PARTS = {"vae": 3, "encoder": 6}

models = st.builds(
    HostModel,
    st.integers(10, 50),
    st.floats(0, 10),
    st.sets(st.sampled_from(sorted(PARTS))).map(
        lambda names: {each: PARTS[each] for each in names}
    ),
)
held = st.dictionaries(st.sampled_from("abcdef"), models, max_size=6)


def bytes_of(*models: HostModel) -> int:
    return held_bytes((each.bytes, each.shared) for each in models)


@given(models, held, st.lists(models, max_size=2), st.integers(0, 150))
def test_the_budget_holds_and_no_more_is_lost_than_is_gained(
    new: HostModel, held: dict[str, HostModel], staying: list[HostModel], budget: int
) -> None:
    fixed = [(each.bytes, each.shared) for each in staying]
    dropped = models_to_drop(new, held, budget, fixed)
    if dropped is None:
        assert bytes_of(new, *staying, *held.values()) > budget, "what fits is kept"
        return
    rest = {id: each for id, each in held.items() if id not in dropped}
    assert bytes_of(new, *staying, *rest.values()) <= budget
    assert sum(held[id].value for id in dropped) <= new.value
    for id in dropped:
        assert bytes_of(new, *staying, *rest.values(), held[id]) > budget, "none goes in vain"


def test_a_model_whose_parts_others_hold_makes_no_room() -> None:
    """The worth of its bytes is least, and none of them would be free."""
    part = {"encoder": 6}
    held = {"all": HostModel(6, 0.0, part), "more": HostModel(10, 1.0, part)}
    assert models_to_drop(HostModel(4, 2.0), held, 10) == ("more",)
    assert models_to_drop(HostModel(4, 0.5), held, 10) is None
    assert models_to_drop(HostModel(4, 2.0), held, 14) == ()


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
