"""A folder of models that changes while a server runs, over the wire, with the fake engine."""

import asyncio
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest

from darkroom.v1 import generation_pb2, model_pb2
from darkroom_server.backends.fake import FakeEngine
from darkroom_server.core.engine_config import ModelSource
from darkroom_server.dispatch.engines import pool
from darkroom_server.dispatch.models import file_watch
from darkroom_server.settings import Http, sources
from darkroom_server.settings.models_folder import models_below
from tests.server.clock import Clock
from tests.server.rpc.test_model_changes import folder, listed, load, served, unload
from tests.server.telemetry.scrape import counted
from tests.server.wire import Wire, refusal

__all__ = ["folder"]

AVAILABLE, FAILED, RESIDENT = (
    model_pb2.MODEL_STATE_AVAILABLE,
    model_pb2.MODEL_STATE_FAILED,
    model_pb2.MODEL_STATE_RESIDENT,
)


def add(folder: Path, model: str) -> None:
    (folder / model).mkdir(parents=True)
    (folder / model / "model_index.json").write_text("{}")


async def states(wire: Wire) -> set[tuple[str, ...]]:
    return set(await counted(wire, "darkroom_model_state", "model", "state"))


async def test_a_new_folder_is_found_described_and_served(folder: Path) -> None:
    async with served(folder) as wire:
        assert list(await listed(wire)) == ["owls", "toads"]
        add(folder, "deep/moths")
        models = await listed(wire)
        assert list(models) == ["owls", "toads", "deep/moths"]
        found = models["deep/moths"]
        assert (found.state, found.ready, found.weight_bytes) == (AVAILABLE, False, 100)
        assert found.kind == "StableDiffusionPipeline"
        assert wire.engine.loaded == []
        assert ("deep/moths", "available") in await states(wire)
        assert len((await wire.generate(model="deep/moths")).images) == 1
        assert wire.engine.loaded == ["deep/moths"]
        steps = await counted(wire, "darkroom_steps_total", "model")
        assert steps[("deep/moths",)] > 0
        # A call that names it looks too.
        add(folder, "newts")
        assert (await load(wire, "newts")).state == RESIDENT
        add(folder, "bats")
        one = await wire.models.GetModel(model_pb2.GetModelRequest(model="bats"))
        assert one.model.state == AVAILABLE


async def test_requests_find_new_models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_watch, "FIND_SECONDS", 600.0)
    async with served(folder, http=Http(http_port=0)) as wire, httpx2.AsyncClient() as client:
        for model in ("deep/moths", "newts"):  # What is found does not delay the next look.
            add(folder, model)
            assert len((await wire.generate(model=model)).images) == 1
        add(folder, "bats")
        request = generation_pb2.EstimateGenerationRequest(
            generation=generation_pb2.GenerateRequest(prompt="a star", model="bats")
        )
        assert (await wire.generation.EstimateGeneration(request)).peak_bytes > 0
        add(folder, "crows")
        adapters = model_pb2.ListAdaptersRequest(model="crows")
        assert not (await wire.models.ListAdapters(adapters)).adapters
        add(folder, "hens")
        url = f"http://{wire.server.http_address}/v1/images/generations"
        body = {"model": "hens", "prompt": "a star"}
        assert len((await client.post(url, json=body)).json()["data"]) == 1
        unknown = await client.post(url, json={**body, "model": "cows"})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_model")
        # From now on it does, and a list still looks at once.
        add(folder, "cows")
        assert (await refusal(wire.generate(model="cows"))).info.reason == "UNKNOWN_MODEL"
        assert "cows" in await listed(wire)
        assert len((await wire.generate(model="cows")).images) == 1


async def test_a_name_is_looked_for_beside_the_event_loop_and_not_all_the_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setattr(file_watch, "FIND_SECONDS", 600.0)
    looks: list[threading.Thread] = []
    may_end = threading.Event()

    def slow(path: Path) -> Iterator[tuple[str, Path]]:
        looks.append(threading.current_thread())
        assert may_end.wait(60)
        return models_below(path)

    async with served(folder) as wire:
        monkeypatch.setattr(sources, "models_below", slow)
        calls = [asyncio.create_task(refusal(wire.generate(model=f"no-{n}"))) for n in range(20)]
        await wire.becomes(lambda: bool(looks))
        assert len((await wire.generate(model="owls")).images) == 1
        assert not any(call.done() for call in calls)
        may_end.set()
        for refused in await asyncio.gather(*calls):
            assert (refused.code, refused.info.reason) == (
                grpc.StatusCode.NOT_FOUND,
                "UNKNOWN_MODEL",
            )
        assert len(looks) == 1
        assert looks[0] is not threading.main_thread()
        clock.skip(300.0)
        await refusal(wire.generate(model="no-0"))
        assert len(looks) == 1
        clock.skip(300.0)
        await refusal(wire.generate(model="no-0"))
        assert len(looks) == 2


async def test_requests_for_a_model_that_is_being_described_wait_for_that(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Sequence[ModelSource]] = []
    async with served(folder) as wire:
        with monkeypatch.context() as patch:
            patch.setattr(FakeEngine, "describe_models", lambda _, found: asked.append(found))
            add(folder, "moths")
            calls: list[asyncio.Task[Any]] = [wire.generating(model="moths")]
            await wire.becomes(lambda: bool(asked))
            calls += [wire.generating(model="moths") for _ in range(3)]
            assert len((await wire.generate(model="owls")).images) == 1
            assert not any(call.done() for call in calls)
        wire.engine.describe_models(asked[0])
        for answer in await asyncio.gather(*calls):
            assert len(answer.images) == 1
        assert len(asked) == 1


async def test_http_lists_it_too(folder: Path) -> None:
    async with served(folder, http=Http(http_port=0)) as wire, httpx2.AsyncClient() as client:
        url = f"http://{wire.server.http_address}/v1/models"
        add(folder, "moths")
        data = (await client.get(url)).json()["data"]
        assert [model["id"] for model in data] == ["owls", "toads", "moths"]
        add(folder, "newts")
        assert (await client.get(f"{url}/newts")).json()["kind"] == "StableDiffusionPipeline"


async def test_a_model_that_is_gone_leaves_once_nothing_uses_it(folder: Path) -> None:
    async with served(folder, hold_loads=True) as wire:
        waits = wire.generating(model="owls")
        await wire.becomes(lambda: wire.engine.loading == ["owls"])
        for model in ("owls", "toads"):
            shutil.rmtree(folder / model)
        assert list(await listed(wire)) == ["owls"], "it is loaded, and a job waits for it"
        gone = await refusal(wire.generate(model="toads"))
        assert (gone.code, gone.info.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL")
        assert {model for model, _ in await states(wire)} == {"owls"}
        wire.engine.finish_load()
        assert len((await waits).images) == 1
        # It is in memory, and serves.
        assert (await listed(wire))["owls"].state == RESIDENT
        again = wire.generating(model="owls")
        assert len((await again).images) == 1
        assert await unload(wire, "owls") == 0
        assert await listed(wire) == {}
        assert await states(wire) == set()
        # It may come back.
        add(folder, "owls")
        assert list(await listed(wire)) == ["owls"]
        back = wire.generating(model="owls")
        await wire.becomes(lambda: wire.engine.loading == ["owls"])
        wire.engine.finish_load()
        assert len((await back).images) == 1


async def test_a_pinned_model_stays_though_its_files_are_gone(folder: Path) -> None:
    async with served(folder) as wire:
        await wire.models.PinModel(model_pb2.PinModelRequest(model="owls", pinned=True))
        shutil.rmtree(folder / "owls")
        assert (await listed(wire))["owls"].state == RESIDENT


async def test_a_folder_out_of_reach_changes_nothing(folder: Path, tmp_path: Path) -> None:
    async with served(folder) as wire:
        away = tmp_path.with_name(tmp_path.name + "-away")
        folder.rename(away)
        assert list(await listed(wire)) == ["owls", "toads"]
        away.rename(folder)
        assert list(await listed(wire)) == ["owls", "toads"]


async def test_what_is_copied_while_somebody_looks_is_described_again(folder: Path) -> None:
    async with served(folder) as wire:
        wire.engine.failing["moths"] = "its unet is missing"
        add(folder, "moths")
        early = (await listed(wire))["moths"]
        assert (early.state, early.state_reason) == (FAILED, "its unet is missing")
        refused = await refusal(wire.generate(model="moths"))
        assert (refused.code, refused.info.reason) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "MODEL_UNUSABLE",
        )
        wire.engine.failing.clear()
        # As long as the files are the same, nothing is tried again.
        assert (await listed(wire))["moths"].state == FAILED
        (folder / "moths" / "unet").mkdir()
        (folder / "moths" / "unet" / "config.json").write_text("{}")
        assert (await listed(wire))["moths"].state == AVAILABLE
        assert len((await wire.generate(model="moths")).images) == 1


async def test_an_engine_that_starts_again_knows_what_came_and_what_went(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "FIRST_BACKOFF_SECONDS", 0.001)
    async with served(folder) as wire:
        add(folder, "moths")
        shutil.rmtree(folder / "toads")
        assert list(await listed(wire)) == ["owls", "moths"]
        wire.engine.die()
        await wire.becomes(lambda: wire.server.dispatcher.snapshot().engines[0].restarts == 1)
        await wire.becomes(lambda: wire.server.dispatcher.ready)
        assert list(await listed(wire)) == ["owls", "moths"]
        assert len((await wire.generate(model="moths")).images) == 1
