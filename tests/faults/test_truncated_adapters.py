"""LoRA files that are cut short while a real engine process reads them, beside running jobs."""

import asyncio
import os
from pathlib import Path
from typing import Any

import diffusers
import grpc
import pytest

from darkroom.v1 import generation_pb2, model_pb2
from darkroom_server.backends import process
from darkroom_server.dispatch.engines import pool
from darkroom_server.settings.adapters import Adapters
from tests.engine.adapter_files import write_kohya
from tests.engine.tiny import write_tiny_model

from .served_models import kill, reason_of, restarts
from .tapped import SERVING, Wire, serving
from .test_truncated_files import begun

LONG: dict[str, Any] = {"steps": 150}
"""A job without adapters, which runs while the files of others are read."""

UNUSABLE = (grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_UNUSABLE")

CUTTING_CHILD = (
    "-c",
    """
import os
from pathlib import Path

import safetensors

from darkroom_server.engine import main as engine

def cut(file):
    marker = Path(file).with_suffix(".cut")
    if marker.exists():
        os.truncate(file, os.stat(file).st_size // 2)
        marker.unlink()

def open_file(file, *options, **fields):
    opened = usual_open(file, *options, **fields)
    if file.suffix == ".safetensors":
        cut(file)
    return opened

def map_file(file, *options, **fields):
    mapped = usual_map(file, *options, **fields)
    cut(file)
    return mapped

usual_open, Path.open = Path.open, open_file
usual_map, safetensors.safe_open = safetensors.safe_open, map_file
engine.main()
""",
)
"""Python's arguments for an engine process that loses half of a file that it has just opened, or
mapped, if a file of that name with the ending ``.cut`` is there; it removes that one."""


async def pixels(wire: Wire, *loras: str, **fields: Any) -> list[str]:
    named = [generation_pb2.Lora(id=id) for id in loras]
    images = (await wire.generate(loras=named, **fields)).images
    return [image.replay.pixels_sha256 for image in images]


async def add(wire: Wire, id: str) -> None:
    await wire.models.AddAdapter(model_pb2.AddAdapterRequest(id=id))


async def test_a_lora_that_is_cut_short_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the calls that need it fail, no engine dies, and an engine can start without it."""
    model = write_tiny_model(tmp_path / "model")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    folder, named = tmp_path / "folder", tmp_path / "named.safetensors"
    folder.mkdir()
    write_kohya(named, pipeline)
    whole = named.read_bytes()
    assert len(whole) > 4 * os.sysconf("SC_PAGESIZE"), "its last alphas are in another page"
    late = folder / "late.safetensors"
    monkeypatch.setattr(pool, "FIRST_BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr(process, "CHILD", CUTTING_CHILD)
    adapters = Adapters(lora=(f"named={named}",), lora_dir=str(folder))
    async with serving(model, adapters=adapters) as wire:
        plain = await pixels(wire, **LONG)
        running = asyncio.create_task(pixels(wire, **LONG))
        active = await begun(wire)

        # The headers of a new one are read between the batches of the jobs that run.
        late.write_bytes(whole)
        late.with_suffix(".cut").touch()
        code, reason, message = await reason_of(add(wire, "late"))
        assert (code, reason) == UNUSABLE
        assert "it is not a safetensors file" in message
        assert late.stat().st_size == len(whole) // 2

        # The weights of one on offer are read when a job needs them.
        named.with_suffix(".cut").touch()
        code, reason, message = await reason_of(pixels(wire, "named"))
        assert (code, reason) == UNUSABLE
        assert "adapter 'named' cannot be used any more: it is not a safetensors file" in message
        assert named.stat().st_size == len(whole) // 2

        assert not running.done()
        assert await running == plain
        assert (active.crashes, restarts(wire)) == (0, 0)

        # An engine that starts again finds the damaged file.
        await kill(wire)
        await wire.health_becomes(SERVING)
        assert (await reason_of(pixels(wire, "named")))[:2] == UNUSABLE
        assert await pixels(wire, **LONG) == plain
        for file in (named, late):
            file.write_bytes(whole)
        await add(wire, "late")
        adapted = await pixels(wire, "named")
        assert adapted == await pixels(wire, "late") != await pixels(wire)
        assert restarts(wire) == 1
