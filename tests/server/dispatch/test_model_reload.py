"""A model whose files have changed is read again, once the jobs that run have ended."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from darkroom_server.backends.fake import FakeEngine
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.catalog import ModelDescription, ModelState
from darkroom_server.core.engine_config import ModelSource
from darkroom_server.core.errors import ModelUnusable
from darkroom_server.core.file_stamps import stamp_of
from darkroom_server.core.model import ModelInfo
from darkroom_server.core.model_events import ModelLoad
from darkroom_server.core.model_places import ModelsFolder
from darkroom_server.dispatch import ActiveJob, Dispatcher
from tests.server.dispatch.harness import SPEED, settle
from tests.server.dispatch.test_model_catalog import revived
from tests.server.jobs import make_job


class ReadsFolder(FakeEngine):
    """Reports the stamp of the folder of its model "a"."""

    folder: Path

    def _description_of(self, info: ModelInfo, stamp: str = "") -> ModelDescription:
        return super()._description_of(info, stamp or stamp_of(self.folder))

    def _load_of(self, id: str) -> ModelLoad:
        return replace(super()._load_of(id), stamp=stamp_of(self.folder))


@asynccontextmanager
async def holding(engine: ReadsFolder, folder: Path) -> AsyncIterator[Dispatcher]:
    """A dispatcher of "a", which lies in ``folder`` below the folder of models, and of "b"."""
    (folder / "model_index.json").write_text("{}")
    engine.folder = folder
    source = ModelSource(id="a", location=str(folder))
    dispatcher = Dispatcher(
        [engine],
        ["a", "b"],
        max_queued_jobs=8,
        max_resident_samples=4,
        model_locations={"a": str(folder)},
        models_folder=ModelsFolder({"a": source}, lambda: (source,)),
    )
    dispatcher.start()
    await dispatcher.loaded()
    yield dispatcher
    await dispatcher.close()


def state(dispatcher: Dispatcher) -> tuple[ModelState, str]:
    status = dispatcher.models.status("a")
    return status.state, status.reason


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[tuple[Dispatcher, ReadsFolder]]:
    """A dispatcher that has loaded the model "a", whose files lie in ``folder``."""
    (folder / "model_index.json").write_text("{}")
    engine = ReadsFolder(catalogue=[replace(fake_model("a"), speed=SPEED)])
    engine.folder = folder
    dispatcher = Dispatcher(
        [engine],
        ["a"],
        max_queued_jobs=8,
        max_resident_samples=4,
        model_locations={"a": str(folder)},
    )
    dispatcher.start()
    await dispatcher.loaded()
    await dispatcher.load_model("a")
    yield dispatcher, engine
    await dispatcher.close()


def submit(dispatcher: Dispatcher, id: str) -> ActiveJob:
    return dispatcher.submit(make_job(id, model="a"))


async def reload(dispatcher: Dispatcher) -> "asyncio.Task[None]":
    """Begin a load, and wait until it waits for jobs, or has ended."""
    call = asyncio.create_task(dispatcher.load_model("a"))
    while not (call.done() or dispatcher.models._states.to_reload):
        await asyncio.sleep(0)
    await settle()
    return call


async def test_files_that_did_not_change_are_not_read_again(tmp_path: Path) -> None:
    async with serving(tmp_path) as (dispatcher, engine):
        await dispatcher.models.look_at_files()
        assert not dispatcher.models.status("a").changed
        await dispatcher.load_model("a")
        assert engine.loaded == ["a"]


async def test_the_old_files_serve_the_jobs_that_run_and_the_new_ones_the_rest(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path) as (dispatcher, engine):
        running = submit(dispatcher, "running")
        await settle()
        (tmp_path / "model_index.json").write_text("{ }")
        await dispatcher.models.look_at_files()
        assert dispatcher.models.status("a").changed
        assert engine.loaded == ["a"], "nobody asked for it"
        call = await reload(dispatcher)
        waiting = submit(dispatcher, "waiting")
        await settle()
        engine.advance(1)
        assert [job.id for job in engine.jobs] == ["running"]
        assert not call.done()
        assert engine.unloaded == []
        engine.advance(3)
        await settle()
        await call
        assert running.finished
        assert engine.unloaded == ["a"]
        assert engine.loaded == ["a", "a"]
        assert not dispatcher.models.status("a").changed
        assert [job.id for job in engine.jobs] == ["waiting"]
        engine.advance(4)
        await settle()
        assert waiting.finished


async def test_a_folder_that_is_gone_counts_as_changed(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    async with serving(folder) as (dispatcher, engine):
        (folder / "model_index.json").unlink()
        folder.rmdir()
        engine.failing["a"] = "it is gone"
        await dispatcher.models.look_at_files()
        assert dispatcher.models.status("a").changed
        call = await reload(dispatcher)
        assert str(call.exception()) == "model 'a' cannot be loaded: it is gone"
        assert not dispatcher.models.status("a").changed
        assert dispatcher.models.status("a").reason == "it is gone"


async def test_a_model_of_the_start_is_described_again_once_it_left_and_its_files_changed(
    tmp_path: Path,
) -> None:
    engine = ReadsFolder([fake_model("a")], catalogue=[fake_model("b")])
    async with holding(engine, tmp_path) as dispatcher:
        assert state(dispatcher) == (ModelState.RESIDENT, "")
        dispatcher.unload_model("a")
        await settle()
        engine.failing["a"] = "its unet is missing"
        await dispatcher.models.look_at_files()
        assert state(dispatcher) == (ModelState.AVAILABLE, ""), "its files are the same"
        (tmp_path / "model_index.json").write_text("{ }")
        await dispatcher.models.look_at_files()
        assert state(dispatcher) == (ModelState.FAILED, "its unet is missing")


async def test_new_files_of_a_model_that_killed_engines_get_two_tries_again(tmp_path: Path) -> None:
    engine = ReadsFolder(catalogue=[fake_model("a"), fake_model("b")], hold_loads=True)
    async with holding(engine, tmp_path) as dispatcher:
        await dispatcher.models.look_at_files()
        first, second = submit(dispatcher, "first"), None
        for death in range(1, 4):
            assert engine.loading == ["a"]
            engine.die()
            await revived(dispatcher, death)
            if death == 2:
                assert isinstance(first.error, ModelUnusable)
                assert "2 engines died" in state(dispatcher)[1]
                (tmp_path / "model_index.json").write_text("{ }")
                await dispatcher.models.look_at_files()
                assert state(dispatcher) == (ModelState.AVAILABLE, "")
                second = submit(dispatcher, "second")
        assert second is not None
        assert second.error is None
        engine.finish_load()
        await settle()
        engine.advance(4)
        await settle()
        assert second.finished
