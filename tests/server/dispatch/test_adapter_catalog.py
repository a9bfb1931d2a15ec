"""Adapters on offer when there are several engines."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from darkroom_server.backends.fake import FakeEngine
from darkroom_server.backends.fake_model import fake_image_model
from darkroom_server.core.adapter_places import AdapterPlaces
from darkroom_server.core.errors import NotReady
from darkroom_server.dispatch import Dispatcher
from tests.server.dispatch.harness import settle

MODELS = [replace(fake_image_model(), adapters=())]


class CheckedLater(FakeEngine):
    """Checks an adapter only when ``answer`` is called."""

    def check_adapter(self, source: object) -> None:
        self.asked = source

    def answer(self) -> None:
        super().check_adapter(self.asked)  # type: ignore[arg-type]


def dispatcher_of(folder: Path, *engines: FakeEngine) -> Dispatcher:
    (folder / "pastel.safetensors").write_text("fits")
    return Dispatcher(
        engines,
        ["demo"],
        max_queued_jobs=4,
        max_resident_samples=2,
        adapter_places=AdapterPlaces(folder=folder),
    )


async def test_every_engine_learns_of_an_adapter_also_one_that_still_loads(tmp_path: Path) -> None:
    ready, loading = FakeEngine(MODELS), FakeEngine(MODELS, load=False)
    dispatcher = dispatcher_of(tmp_path, ready, loading)
    dispatcher.start()
    await dispatcher.loaded()
    added = await dispatcher.adapters.add("pastel")
    assert added.models == ("demo",)
    assert ready.offered == loading.offered
    assert set(loading.offered) == {"pastel"}
    # It reports what was on offer when it began to load: nothing.
    loading.become_ready()
    await settle()
    assert [each.id for each in dispatcher.availability.adapters] == ["pastel"]
    assert dispatcher.adapters.remove("pastel") == 0
    assert ready.offered == loading.offered == {}
    loading.become_ready()
    await settle()
    assert dispatcher.availability.adapters == []
    await dispatcher.close()


async def test_without_a_ready_engine_nothing_is_added(tmp_path: Path) -> None:
    engine = FakeEngine(MODELS, load=False)
    dispatcher = dispatcher_of(tmp_path, engine)
    dispatcher.start()
    with pytest.raises(NotReady, match="no engine is ready"):
        await dispatcher.adapters.add("pastel")
    assert engine.offered == {}
    engine.become_ready()
    await dispatcher.loaded()
    dispatcher.refuse_new_jobs()
    with pytest.raises(NotReady, match="shutting down"):
        await dispatcher.adapters.add("pastel")
    await dispatcher.close()


async def test_calls_at_the_same_time_check_an_adapter_once(tmp_path: Path) -> None:
    engine = CheckedLater(MODELS)
    dispatcher = dispatcher_of(tmp_path, engine)
    dispatcher.start()
    await dispatcher.loaded()
    gone = asyncio.create_task(dispatcher.adapters.add("pastel"))
    while not hasattr(engine, "asked"):
        await asyncio.sleep(0)
    gone.cancel()
    engine.answer()  # Nobody waits for it.
    with pytest.raises(asyncio.CancelledError):
        await gone
    await settle()
    del engine.asked
    both = [asyncio.create_task(dispatcher.adapters.add("pastel")) for _ in range(2)]
    while not hasattr(engine, "asked"):
        await asyncio.sleep(0)
    engine.answer()
    assert len({(await each).id for each in both}) == 1
    assert set(engine.offered) == {"pastel"}
    await dispatcher.close()
