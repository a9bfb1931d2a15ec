"""Models that are loaded beside running jobs by a real engine process, and loads that fail."""

import asyncio
import itertools
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import safetensors.torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from darkroom.v1 import model_pb2
from darkroom_server.app import EngineLost, Server
from darkroom_server.core.events import BatchDone, Event, ModelLoaded
from darkroom_server.dispatch.engines import pool
from darkroom_server.settings import Models, Network, Settings
from darkroom_server.settings.sources import all_sources
from tests.engine.conftest import config_for
from tests.engine.tiny import write_tiny_model

from .tapped import SERVING, TappedEngine, Wire

MANY = 400
"""Steps of a job that runs while another model is loaded."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A folder of three models whose pictures differ."""
    for number, name in enumerate(("owls", "toads", "moths")):
        shutil.copytree(tiny, tmp_path / name)
        file = tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors"
        weights = safetensors.torch.load_file(file)
        perturbed = {key: value * (1.0 + 0.05 * number) for key, value in weights.items()}
        safetensors.torch.save_file(perturbed, file, {"format": "pt"})
    return tmp_path


@asynccontextmanager
async def serving(folder: Path, *, budget: int | None = None, **engine: Any) -> AsyncIterator[Wire]:
    """A server over the models in ``folder``, of which none is loaded at start."""
    models = Models(models_dir=str(folder), device_memory_budget=budget)
    settings = Settings(models=models, network=Network(port=0, metrics_port=0))
    config = config_for(folder, rows=4, models=(), catalogue=all_sources(models), **engine)
    tapped = TappedEngine(config)
    server = Server(settings, [tapped])
    await server.startup()
    serve = asyncio.create_task(server.serve())
    async with grpc.aio.insecure_channel(server.address) as channel:
        wire = Wire(server, serve, tapped, channel)
        try:
            await wire.health_becomes(SERVING)
            yield wire
        finally:
            server.stop()
            with suppress(EngineLost):
                await serve
            await server.shutdown()


async def pixels(wire: Wire, model: str, **fields: Any) -> str:
    (image,) = (await wire.generate(model=model, **fields)).images
    return str(image.replay.pixels_sha256)


async def listed(wire: Wire) -> dict[str, Any]:
    found = await wire.models.ListModels(model_pb2.ListModelsRequest())
    return {model.id: model for model in found.models}


async def reason_of(call: Any) -> tuple[grpc.StatusCode, str, str]:
    """The code, the reason and the message of the error that ``call`` ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
    assert status is not None
    info = error_details_pb2.ErrorInfo()
    status.details[0].Unpack(info)
    return caught.value.code(), info.reason, status.message


def cut_short(folder: Path) -> None:
    """Leave half of the weights of a model's UNet."""
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


async def test_models_share_the_budget_of_one(folder: Path) -> None:
    async with serving(folder) as wire:
        described = await listed(wire)
        assert {model.state for model in described.values()} == {model_pb2.MODEL_STATE_AVAILABLE}
        first = {name: await pixels(wire, name) for name in described}
        assert len(set(first.values())) == 3
        loaded = await listed(wire)
        assert all(model.ready for model in loaded.values())
        for name, before in described.items():
            assert before.defaults == loaded[name].defaults
            assert before.optional_fields == loaded[name].optional_fields
            assert before.schedulers == loaded[name].schedulers
            assert not before.revision
            assert loaded[name].revision.startswith("sha256:")
        size = loaded["owls"].weight_bytes
        assert abs(size - described["owls"].weight_bytes) < 0.05 * size
    async with serving(folder, budget=size) as wire:
        names = [*first, *first, *first]
        found = await asyncio.gather(*(pixels(wire, name) for name in names))
        assert found == [first[name] for name in names]
        models = await listed(wire)
        assert sum(model.ready for model in models.values()) == 1
        evictions = sum(
            sample.value
            for metric in wire.server.metrics.models.evictions.collect()
            for sample in metric.samples
        )
        assert evictions >= 2
        (resident,) = (id for id, model in models.items() if model.ready)
        request = model_pb2.UnloadModelRequest(model=resident)
        assert (await wire.models.UnloadModel(request)).unfinished_jobs == 0
        assert not any(model.ready for model in (await listed(wire)).values())
        assert await pixels(wire, resident) == first[resident]


async def test_a_running_job_goes_on_while_another_model_is_loaded(folder: Path) -> None:
    async with serving(folder) as wire:
        alone = await pixels(wire, "owls", steps=MANY)
        ends: list[float] = []
        during: list[float] = []
        loading = asyncio.Event()

        def watch(event: Event) -> None:
            if isinstance(event, BatchDone) and event.model == "owls":
                ends.append(event.ended_at)
                if loading.is_set():
                    during.append(event.ended_at)
            elif isinstance(event, ModelLoaded):
                loading.clear()

        wire.engine.on_event = watch
        running = asyncio.create_task(pixels(wire, "owls", steps=MANY))
        while not ends:
            await asyncio.sleep(0.001)
        loading.set()
        await wire.models.LoadModel(model_pb2.LoadModelRequest(model="toads"))
        assert await running == alone
        assert len(during) > 20
        gaps = [later - earlier for earlier, later in itertools.pairwise(during)]
        # A load takes seconds of one thread; a batch takes milliseconds.
        assert sorted(gaps)[-1] < 1.0
        assert sorted(gaps)[len(gaps) // 2] < 0.1


async def test_damaged_models_fail_and_others_go_on(folder: Path) -> None:
    async with serving(folder) as wire:
        cut_short(folder / "toads")
        shutil.rmtree(folder / "moths")
        for name in ("toads", "moths"):
            code, reason, message = await reason_of(wire.generate(model=name))
            assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_UNUSABLE")
            assert name in message
        models = await listed(wire)
        for name in ("toads", "moths"):
            assert models[name].state == model_pb2.MODEL_STATE_FAILED
            assert models[name].state_reason
        assert len(await pixels(wire, "owls")) == 64
        (engine,) = wire.server.dispatcher.snapshot().engines
        assert engine.restarts == 0


async def test_damaged_before_the_start(folder: Path) -> None:
    cut_short(folder / "toads")
    (folder / "moths" / "model_index.json").write_text("{}")
    async with serving(folder) as wire:
        models = await listed(wire)
        for name in ("toads", "moths"):
            assert models[name].state == model_pb2.MODEL_STATE_FAILED
            code, reason, _ = await reason_of(wire.generate(model=name))
            assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_UNUSABLE")
        assert models["owls"].state == model_pb2.MODEL_STATE_AVAILABLE
        assert len(await pixels(wire, "owls")) == 64


async def test_an_engine_killed_in_a_load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first death is nobody's, the second is the model's; a running job is never blamed."""
    monkeypatch.setattr(pool, "FIRST_BACKOFF_SECONDS", 0.001)
    async with serving(folder) as wire:
        owls, toads = await pixels(wire, "owls", steps=MANY), await pixels(wire, "toads")
        await wire.models.UnloadModel(model_pb2.UnloadModelRequest(model="toads"))
        dispatcher = wire.server.dispatcher
        running = asyncio.create_task(pixels(wire, "owls", steps=MANY))
        waits = asyncio.create_task(pixels(wire, "toads"))
        await killed_in_a_load(wire, "toads")
        assert await waits == toads
        assert await running == owls
        (engine,) = dispatcher.snapshot().engines
        assert engine.restarts == 1
        await wire.models.UnloadModel(model_pb2.UnloadModelRequest(model="toads"))
        fails = asyncio.create_task(reason_of(wire.generate(model="toads")))
        for _ in range(2):
            await killed_in_a_load(wire, "toads")
        assert (await fails)[1] == "MODEL_UNUSABLE"
        assert (await listed(wire))["toads"].state == model_pb2.MODEL_STATE_FAILED
        assert await pixels(wire, "owls", steps=MANY) == owls
        request = model_pb2.LoadModelRequest(model="toads")
        assert (await wire.models.LoadModel(request)).model.ready
        assert await pixels(wire, "toads") == toads


async def killed_in_a_load(wire: Wire, model: str) -> None:
    """Kill the engine while it loads ``model``, and wait until it is seen to be dead."""
    (engine,) = wire.server.dispatcher._pool.engines
    while engine.loading is None or engine.loading.model != model:
        await asyncio.sleep(0.001)
    wire.engine.kill()
    while engine.ready:
        await asyncio.sleep(0.001)
