"""Files that are cut short while a real engine process has them mapped: the kernel sends SIGBUS.

A file that is short when it is opened is an error of the load; see ``test_model_loads``.
"""

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from darkroom.v1 import model_pb2
from darkroom_server.backends import process
from darkroom_server.core.events import EngineDied, Event
from darkroom_server.dispatch import ActiveJob
from darkroom_server.dispatch.engines import pool

from .served_models import (
    listed,
    load,
    pixels,
    reason_of,
    restarts,
    serving,
    write_models,
)
from .tapped import Wire

RUNNING: dict[str, Any] = {"steps": 60, "image_count": 2}
"""A job that runs while another model is loaded."""

UNET = Path("toads") / "unet" / "diffusion_pytorch_model.safetensors"

UNUSABLE = (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_UNUSABLE")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_models(tmp_path / "models", ("owls", "toads"))
    return tmp_path / "models"


def cutting_child(file: Path, copies: Path) -> tuple[str, str]:
    """Python's arguments for an engine process in which ``file`` is cut short once it is mapped.

    Each process puts one of ``copies`` in its place at the start, as if somebody copied it again.
    One that finds none there reads ``file`` as it is.
    """
    return (
        "-c",
        f"""
import os
from pathlib import Path
from darkroom_server.engine import main as engine

file, copies = Path({str(file)!r}), Path({str(copies)!r})

def run(*arguments):
    import safetensors.torch

    copy = next(copies.iterdir(), None)
    if copy is not None:
        copy.replace(file)

    def load_file(path, *options, **fields):
        mapped = read(path, *options, **fields)
        if copy is not None and Path(path) == file:
            os.truncate(file, file.stat().st_size // 2)
        return mapped

    read, safetensors.torch.load_file = safetensors.torch.load_file, load_file
    run_engine(*arguments)

run_engine, engine.run = engine.run, run
engine.main()
""",
    )


Death = tuple[int | None, str]
"""The exit code of an engine's process, and which model it read into which memory."""

ON_DEVICE = (-signal.SIGBUS, "device: toads")
IN_HOST = (-signal.SIGBUS, "host: toads")


@asynccontextmanager
async def cutting(
    folder: Path, monkeypatch: pytest.MonkeyPatch, times: int, **options: Any
) -> AsyncIterator[tuple[Wire, list[Death]]]:
    """A server that reads the UNet of "toads" as ``cutting_child`` does, and the deaths of its
    engine's processes."""
    copies = folder.parent / "copies"
    copies.mkdir()
    for number in range(times):
        shutil.copyfile(folder / UNET, copies / str(number))
    monkeypatch.setattr(pool, "FIRST_BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr(process, "CHILD", cutting_child(folder / UNET, copies))
    deaths: list[Death] = []
    async with serving(folder, **options) as wire:
        (engine,) = wire.server.dispatcher._pool.engines

        def watch(event: Event) -> None:
            if isinstance(event, EngineDied):
                assert wire.engine._process is not None
                places = (("device", engine.loading), ("host", engine.reading))
                during = ", ".join(f"{at}: {each.model}" for at, each in places if each)
                deaths.append((wire.engine._process.process.returncode, during))

        wire.engine.on_event = watch
        yield wire, deaths


async def begun(wire: Wire) -> ActiveJob:
    """The job that the engine runs, once it has run a batch with it."""
    (engine,) = wire.server.dispatcher._pool.engines
    while not any(active.started for active in engine.jobs.values()):
        await asyncio.sleep(0.001)
    (active,) = engine.jobs.values()
    return active


async def test_a_file_that_is_cut_short_whenever_it_is_mapped(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second death is the model's fault. Jobs of others run again, and none is blamed."""
    whole = (folder / UNET).read_bytes()
    async with cutting(folder, monkeypatch, times=2) as (wire, deaths):
        owls = await pixels(wire, "owls", **RUNNING)
        running = asyncio.create_task(pixels(wire, "owls", **RUNNING))
        active = await begun(wire)
        code, reason, message = await reason_of(wire.generate(model="toads"))
        assert (code, reason) == UNUSABLE
        assert "2 engines died while they loaded it; its files may be damaged" in message
        assert deaths == [ON_DEVICE] * 2
        assert await running == owls
        assert active.crashes == 0
        toads = (await listed(wire))["toads"]
        assert toads.state == model_pb2.MODEL_STATE_FAILED
        assert toads.state_reason in message
        assert (await reason_of(wire.generate(model="toads")))[:2] == UNUSABLE
        (folder / UNET).write_bytes(whole)
        assert (await load(wire, "toads")).ready
        pictures = await pixels(wire, "toads")
        assert pictures != await pixels(wire, "owls")
        # Its weights are in memory by now, and no part of the file.
        os.truncate(folder / UNET, 0)
        assert await pixels(wire, "toads") == pictures
        assert deaths == [ON_DEVICE] * 2
        assert restarts(wire) == 2


async def test_a_file_that_is_cut_short_once_is_a_damaged_file_from_then_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a read into the host's memory; ``test_host_reads`` has its second death."""
    async with cutting(folder, monkeypatch, times=1, host=10_000_000) as (wire, deaths):
        owls = await pixels(wire, "owls", **RUNNING)
        running = asyncio.create_task(pixels(wire, "owls", **RUNNING))
        active = await begun(wire)
        code, reason, message = await reason_of(wire.generate(model="toads"))
        assert (code, reason) == UNUSABLE
        assert "its unet cannot be loaded" in message
        assert deaths == [IN_HOST]
        assert await running == owls
        assert active.crashes == 0
        assert (await listed(wire))["toads"].state == model_pb2.MODEL_STATE_FAILED
        assert restarts(wire) == 1
