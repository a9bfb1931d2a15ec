"""A model whose files have changed is read again, once the jobs that run have ended."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from darkroom_server.backends.fake import FakeEngine
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.file_stamps import stamp_of
from darkroom_server.core.model_events import ModelLoad
from darkroom_server.dispatch import ActiveJob, Dispatcher
from tests.server.dispatch.harness import SPEED, settle
from tests.server.jobs import make_job


class ReadsFolder(FakeEngine):
    """Reports the stamp of the folder of its model "a"."""

    folder: Path

    def _load_of(self, id: str) -> ModelLoad:
        return replace(super()._load_of(id), stamp=stamp_of(self.folder))


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
