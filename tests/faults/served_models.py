"""A real server and engine over a folder of models, of which none is loaded at start."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import safetensors.torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from darkroom.v1 import model_pb2
from darkroom_server.settings import Models, Network, Settings
from darkroom_server.settings.sources import all_sources
from tests.engine.conftest import config_for
from tests.engine.tiny import write_tiny_model

from .tapped import TappedEngine, Wire, serving_with

LONG: dict[str, Any] = {"steps": 150, "image_count": 2}
"""A job that runs while another model is loaded."""

NAMES = ("owls", "toads", "moths")


def write_models(folder: Path, names: Sequence[str]) -> None:
    """Write models whose pictures differ."""
    tiny = write_tiny_model(folder / names[0])
    file = Path("unet") / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(tiny / file)
    for number, name in enumerate(names[1:]):
        shutil.copytree(tiny, folder / name)
        perturbed = {key: value * (1.1 + 0.05 * number) for key, value in weights.items()}
        safetensors.torch.save_file(perturbed, folder / name / file, {"format": "pt"})


@asynccontextmanager
async def serving(
    folder: Path,
    *,
    budget: int | None = None,
    host: int | None = None,
    configuration: Path | None = None,
    **engine: Any,
) -> AsyncIterator[Wire]:
    """A server over the models in ``folder``, of which none is loaded at start.

    ``configuration`` is that of single files.
    """
    models = Models(
        models_dir=str(folder),
        device_memory_budget=budget,
        host_memory_budget=host,
        model_config=None if configuration is None else str(configuration),
    )
    settings = Settings(models=models, network=Network(port=0, metrics_port=0))
    config = config_for(folder, rows=4, models=(), catalogue=all_sources(models), **engine)
    async with serving_with(TappedEngine(config), settings) as wire:
        yield wire


async def pixels(wire: Wire, model: str, **fields: Any) -> list[str]:
    images = (await wire.generate(model=model, **fields)).images
    return [image.replay.pixels_sha256 for image in images]


async def listed(wire: Wire) -> dict[str, Any]:
    found = await wire.models.ListModels(model_pb2.ListModelsRequest())
    return {model.id: model for model in found.models}


async def load(wire: Wire, id: str) -> Any:
    return (await wire.models.LoadModel(model_pb2.LoadModelRequest(model=id))).model


async def unload(wire: Wire, id: str) -> int:
    answer = await wire.models.UnloadModel(model_pb2.UnloadModelRequest(model=id))
    return int(answer.unfinished_jobs)


def restarts(wire: Wire) -> int:
    (engine,) = wire.server.dispatcher.snapshot().engines
    return engine.restarts


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


async def killed_in_a_load(wire: Wire, model: str) -> None:
    """Kill the engine while it loads or reads ``model``, and wait until it is seen to be dead."""
    (engine,) = wire.server.dispatcher._pool.engines
    while not any(each.model == model for each in engine.in_progress):
        await asyncio.sleep(0.001)
    await kill(wire)


async def kill(wire: Wire) -> None:
    """Kill the engine, and wait until it is seen to be dead."""
    (engine,) = wire.server.dispatcher._pool.engines
    wire.engine.kill()
    while engine.ready:
        await asyncio.sleep(0.001)
