"""The file of a model of the start breaks, and the engine starts again: the others serve on."""

import asyncio
from collections.abc import Callable
from functools import partial

import pytest

from darkroom_server.backends.fake import FakeEngine
from darkroom_server.backends.fake_model import fake_description
from darkroom_server.core.catalog import ModelDescription
from darkroom_server.core.engine_config import EngineConfig, ModelSource
from darkroom_server.core.errors import ModelUnusable
from darkroom_server.core.events import Event
from darkroom_server.core.model import ModelInfo
from darkroom_server.core.model_events import ModelNotLoaded
from darkroom_server.dispatch import Dispatcher
from darkroom_server.dispatch.engines import pool
from tests.server.dispatch.harness import settle
from tests.server.dispatch.test_model_catalog import (
    catalog,
    models,
    revived,
    states,
    submit,
    two_engines,
)

WHY = "its unet is cut short"


class Restarting(FakeEngine):
    """Starts as the engines of real models do, with what their configuration says.

    A model in ``failing`` fails the start and its load. ``deadly``: it kills the engine instead.
    """

    deadly = False
    failed = 0
    was_ready = False

    def start(self, emit: Callable[[Event], None]) -> None:
        self._emit = emit
        sources = [ModelSource(id=id, location=id) for id in self._catalogue]
        at_start = {model.id for model in self._at_start}
        config = EngineConfig(
            models=tuple(each for each in sources if each.id in at_start),
            catalogue=tuple(each for each in sources if each.id not in at_start),
        ).after_failed_restarts(self.failed)
        self._at_start = tuple(self._catalogue[each.id] for each in config.models)
        broken = [each.id for each in config.models if each.id in self.failing]
        if broken:
            self.failed += self.was_ready
            self.die(self.failing[broken[0]], fatal=not self.deadly)
        else:
            self.failed, self.was_ready = 0, True
            super().start(emit)

    def finish_load(self, free_bytes: int | None = None) -> None:
        if self.deadly and self.loading[0] in self.failing:
            self.die()
        else:
            super().finish_load(free_bytes)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead engine starts again at once."""
    monkeypatch.setattr(pool, "FIRST_BACKOFF_SECONDS", 0.0)


@pytest.mark.parametrize("deadly", [False, True])
async def test_a_model_of_the_start_that_broke_fails_alone(deadly: bool) -> None:
    engine = Restarting(models("a", "b"), catalogue=models("c"))
    engine.deadly = deadly
    async with catalog(engine, pinned=("a", "b"), budget=None) as (dispatcher, _):
        failing, fine = submit(dispatcher, "a"), submit(dispatcher, "b")
        await settle()
        assert states(dispatcher) == {"a": "resident", "b": "resident", "c": "available"}
        assert [job.id for job in engine.jobs] == ["a-job"], "models take turns"
        engine.failing["a"] = WHY
        engine.die()
        # Two restarts fail. Then the model is loaded by itself, twice if it kills the engine.
        await revived(dispatcher, 5 if deadly else 3)
        assert states(dispatcher) == {"a": "failed", "b": "resident", "c": "available"}
        why = "2 engines died while they loaded it" if deadly else WHY
        assert why in dispatcher.models.status("a").reason
        assert isinstance(failing.error, ModelUnusable)
        assert why in str(failing.error)
        with pytest.raises(ModelUnusable):
            submit(dispatcher, "a", "again")
        engine.advance(4)
        await settle()
        assert fine.finished
        assert dispatcher.ready

        engine.failing.clear()
        await dispatcher.load_model("a")
        assert states(dispatcher)["a"] == "resident"
        restarts = dispatcher.snapshot().engines[0].restarts
        engine.die()
        await revived(dispatcher, restarts + 1)
        assert states(dispatcher) == {"a": "resident", "b": "resident", "c": "available"}


async def test_a_restart_that_fails_once_loads_all_models_again() -> None:
    engine = Restarting(models("a", "b"), catalogue=models("c"))
    async with catalog(engine, pinned=("a", "b"), budget=None) as (dispatcher, _):
        engine.failing["a"] = WHY
        engine.die()
        while not engine.failed:
            await settle()
        engine.failing.clear()
        await revived(dispatcher, 2)
        assert states(dispatcher) == {"a": "resident", "b": "resident", "c": "available"}
        assert engine.loaded == [], "it was loaded at the start"


@pytest.mark.parametrize("how", ["broken", "deadly", "no memory"])
async def test_a_model_that_one_engine_has_serves_though_another_cannot_load_it(how: str) -> None:
    needed = 2 if how == "deadly" else 1
    async with two_engines() as (dispatcher, (first, second)):
        jobs = [submit(dispatcher, "a", f"a{n}") for n in range(4)]
        await settle()
        assert (first.loaded, second.loaded) == (["a"], [])
        attempts = 0

        def load_model(id: str, *, keep: bool = False, host_only: bool = False) -> None:
            nonlocal attempts
            attempts += 1
            if how == "deadly":
                second.die()
            elif how == "no memory":
                event = ModelNotLoaded(model=id, reason="it needs 7 bytes", out_of_memory=True)
                asyncio.get_running_loop().call_soon(second._emit, event)
            else:
                FakeEngine.load_model(second, id, keep=keep, host_only=host_only)

        second.failing["a"] = WHY
        # Its restarts describe the file that broke; the other engine has read another one.
        second._description_of = partial(description_of, "broken")  # type: ignore[method-assign]
        second.load_model = load_model  # type: ignore[method-assign]
        # The first engine is full.
        jobs.append(submit(dispatcher, "a", "a4"))
        async with asyncio.timeout(30):
            while attempts < needed:
                await asyncio.sleep(0)
        await settle()
        assert states(dispatcher)["a"] == "resident"
        for _ in range(2):
            jobs += [submit(dispatcher, "a", f"a{len(jobs) + n}") for n in range(5)]
            await settle()
            first.advance(4)
            await settle()
        while dispatcher.counts.live:
            first.advance(4)
            await settle()
        assert all(job.finished for job in jobs)
        assert attempts == needed, "it is not tried for each job"


async def test_a_further_engine_tries_again_when_a_restart_has_read_the_model() -> None:
    first = FakeEngine(models("a"), catalogue=models("b"))
    second = FakeEngine(catalogue=models("a", "b"))
    dispatcher = Dispatcher([first, second], ["a", "b"], max_queued_jobs=9, max_resident_samples=4)
    dispatcher.start()
    await dispatcher.loaded()
    second.failing["a"] = WHY
    jobs = [submit(dispatcher, "a", f"a{n}") for n in range(5)]
    await settle()
    assert second.loaded == []
    second.failing.clear()
    while dispatcher.counts.live:
        first.advance(4)
        await settle()
    assert second.loaded == [], "it failed, so it is not tried again"
    first.die()
    await revived(dispatcher, 1)
    jobs += [submit(dispatcher, "a", f"b{n}") for n in range(5)]
    await settle()
    assert second.loaded == ["a"]
    while dispatcher.counts.live:
        for engine in (first, second):
            engine.advance(4)
        await settle()
    assert all(job.finished for job in jobs)
    await dispatcher.close()


async def test_a_model_that_failed_serves_when_an_engine_has_it() -> None:
    engine = FakeEngine(models("a"), catalogue=models("b"))
    async with catalog(engine, budget=None) as (dispatcher, _):
        dispatcher.availability.failures["a"] = WHY  # As another engine has found before.
        with pytest.raises(ModelUnusable):
            submit(dispatcher, "a")
        engine.die()
        await revived(dispatcher, 1)
        job = submit(dispatcher, "a")
        await settle()
        engine.advance(4)
        await settle()
        assert job.finished


def description_of(stamp: str, info: ModelInfo, _: str = "") -> ModelDescription:
    return fake_description(info, 1, stamp, "")


def test_the_only_model_is_loaded_at_every_start() -> None:
    """Without it the server has nothing to serve: it stops, as at its start."""
    one, other = (ModelSource(id=id, location=id) for id in "ab")
    config = EngineConfig(models=(one,))
    assert config.after_failed_restarts(9) == config
    both = EngineConfig(models=(one,), catalogue=(other,))
    assert both.after_failed_restarts(1) == both
    assert both.after_failed_restarts(2) == EngineConfig(models=(), catalogue=(other, one))
