"""Models that a real engine process reads into the host's memory, and copies from there."""

import asyncio
import shutil
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from darkroom.v1 import model_pb2
from darkroom_server.dispatch.engines import pool

from .served_models import (
    LONG,
    NAMES,
    killed_in_a_load,
    listed,
    load,
    pixels,
    reason_of,
    serving,
    unload,
    write_models,
)
from .tapped import SERVING, Wire

in_one_loop = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, (*NAMES, "lost"))
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_host_wire(folder: Path) -> AsyncIterator[Wire]:
    """One server with room for a model on its device and for all in the host's memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "FIRST_BACKOFF_SECONDS", 0.001)
        async with serving(folder, budget=1_500_000, host=10_000_000) as wire:
            yield wire


@pytest_asyncio.fixture(loop_scope="module")
async def host_wire(shared_host_wire: Wire) -> AsyncIterator[Wire]:
    """The shared server with ``NAMES`` in neither memory, ready and without jobs."""
    await shared_host_wire.health_becomes(SERVING)
    assert not shared_host_wire.server.dispatcher.counts.live
    for name in NAMES:
        await unload(shared_host_wire, name)
    while await states(shared_host_wire) != [model_pb2.MODEL_STATE_AVAILABLE] * len(NAMES):
        pass  # Memory is freed at the end of a batch.
    yield shared_host_wire


async def states(wire: Wire) -> list[int]:
    """Where the models of ``NAMES`` are, sorted."""
    return sorted(model.state for id, model in (await listed(wire)).items() if id in NAMES)


def loads_of(wire: Wire, model: str) -> Counter[str]:
    """How often a model was loaded, by where its weights came from."""
    return Counter(
        {
            sample.labels["from"]: int(sample.value)
            for metric in wire.server.metrics.models.loads.collect()
            for sample in metric.samples
            if sample.name.endswith("_total")
            and (sample.labels["model"], sample.labels["outcome"]) == (model, "loaded")
        }
    )


@in_one_loop
async def test_models_that_leave_the_device_come_back_from_the_hosts_memory(
    host_wire: Wire,
) -> None:
    wire, before = host_wire, loads_of(host_wire, "owls")
    first = {name: await pixels(wire, name) for name in NAMES}
    assert await states(wire) == [
        model_pb2.MODEL_STATE_RESIDENT,
        *[model_pb2.MODEL_STATE_HOST] * 2,
    ]
    assert {name: await pixels(wire, name) for name in NAMES} == first
    # It was read into the host's memory, and copied from there twice.
    assert loads_of(wire, "owls") - before == {"disk": 1, "host": 2}


@in_one_loop
async def test_an_engine_killed_while_it_reads_into_the_hosts_memory(host_wire: Wire) -> None:
    wire = host_wire
    (engine,) = wire.server.dispatcher._pool.engines
    owls = await pixels(wire, "owls", **LONG)
    waits = asyncio.create_task(pixels(wire, "toads"))
    while engine.reading is None:
        await asyncio.sleep(0.001)
    await killed_in_a_load(wire, "toads")
    assert len(await waits) == 1
    await unload(wire, "toads")
    running = asyncio.create_task(pixels(wire, "owls", **LONG))
    fails = asyncio.create_task(reason_of(wire.generate(model="toads")))
    for _ in range(2):
        await killed_in_a_load(wire, "toads")
    assert (await fails)[1] == "MODEL_UNUSABLE"
    assert await running == owls
    assert (await listed(wire))["toads"].state == model_pb2.MODEL_STATE_FAILED
    assert (await load(wire, "toads")).ready


@in_one_loop
async def test_a_folder_deleted_before_it_is_read_into_the_hosts_memory(
    host_wire: Wire, folder: Path
) -> None:
    assert (await listed(host_wire))["lost"].state == model_pb2.MODEL_STATE_AVAILABLE
    shutil.rmtree(folder / "lost")
    code, reason, _ = await reason_of(host_wire.generate(model="lost"))
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_UNUSABLE")
    assert len(await pixels(host_wire, "owls")) == 1
