"""Models that are loaded beside running jobs by a real engine process, and loads that fail."""

import asyncio
import itertools
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path

import diffusers
import grpc
import pytest
import pytest_asyncio
import safetensors.torch

from darkroom.v1 import model_pb2
from darkroom_server.core.events import BatchDone, Event
from darkroom_server.dispatch.engines import pool
from tests.engine.original_layout import original_layout

from .served_models import (
    LONG,
    NAMES,
    cut_short,
    killed_in_a_load,
    listed,
    load,
    pixels,
    reason_of,
    restarts,
    serving,
    unload,
    write_models,
)
from .tapped import SERVING, Wire


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two models that are damaged, and the first one once more as a single file."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, (*NAMES, "later", "gone", "short", "fresh"))
    cut_short(folder / "short")
    (folder / "empty").mkdir()
    (folder / "empty" / "model_index.json").write_text("{}")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder / NAMES[0])
    (folder / "deep").mkdir()
    safetensors.torch.save_file(original_layout(pipeline), folder / "deep" / "file.safetensors")
    return folder


@pytest.fixture(scope="module")
def configuration(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of the single file: the folder of its model, without weights."""
    made = tmp_path_factory.mktemp("configuration") / "files"
    shutil.copytree(folder / NAMES[0], made, ignore=shutil.ignore_patterns("*.safetensors"))
    return made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_wire(folder: Path, configuration: Path) -> AsyncIterator[Wire]:
    """One server, whose engine starts again at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "FIRST_BACKOFF_SECONDS", 0.001)
        async with serving(folder, configuration=configuration) as wire:
            yield wire


@pytest_asyncio.fixture(loop_scope="module")
async def wire(shared_wire: Wire) -> AsyncIterator[Wire]:
    """The shared server, ready and without jobs."""
    await shared_wire.health_becomes(SERVING)
    assert not shared_wire.server.dispatcher.counts.live
    shared_wire.engine.on_event = lambda _: None
    yield shared_wire


in_one_loop = pytest.mark.asyncio(loop_scope="module")


@in_one_loop
async def test_models_are_described_before_they_are_loaded(wire: Wire) -> None:
    described = await listed(wire)
    pictures = {name: await pixels(wire, name) for name in NAMES}
    assert len({picture for (picture,) in pictures.values()}) == 3
    loaded = await listed(wire)
    for name in NAMES:
        before, after = described[name], loaded[name]
        assert (before.state, before.ready) == (model_pb2.MODEL_STATE_AVAILABLE, False)
        assert (after.state, after.ready) == (model_pb2.MODEL_STATE_RESIDENT, True)
        assert before.defaults == after.defaults
        assert before.optional_fields == after.optional_fields
        assert before.schedulers == after.schedulers
        assert before.guidance == after.guidance
        assert before.limits.max_size == after.limits.max_size
        assert not before.revision
        assert after.revision.startswith("sha256:")
        assert abs(before.weight_bytes - after.weight_bytes) < 0.05 * after.weight_bytes


@in_one_loop
async def test_damaged_models_fail_and_others_go_on(wire: Wire, folder: Path) -> None:
    before = restarts(wire)
    models = await listed(wire)
    assert {models[name].state for name in ("short", "empty")} == {model_pb2.MODEL_STATE_FAILED}
    assert {models[name].state for name in ("later", "gone")} == {model_pb2.MODEL_STATE_AVAILABLE}
    cut_short(folder / "later")
    shutil.rmtree(folder / "gone")
    for name in ("short", "empty", "later", "gone"):
        code, reason, message = await reason_of(wire.generate(model=name))
        assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_UNUSABLE")
        assert name in message
    after = await listed(wire)
    assert all(after[name].state_reason for name in ("short", "empty", "later"))
    assert "gone" not in after
    assert len(await pixels(wire, "owls")) == 1
    assert restarts(wire) == before


@in_one_loop
async def test_a_running_job_goes_on_while_another_model_is_loaded(wire: Wire) -> None:
    alone = await pixels(wire, "owls", **LONG)
    await unload(wire, "toads")
    during: list[float] = []
    started, loading = asyncio.Event(), False
    loop = asyncio.get_running_loop()

    def watch(event: Event) -> None:
        if isinstance(event, BatchDone) and event.model == "owls":
            loop.call_soon_threadsafe(started.set)
            if loading:
                during.append(event.ended_at)

    wire.engine.on_event = watch
    running = asyncio.create_task(pixels(wire, "owls", **LONG))
    await started.wait()
    loading, began = True, time.monotonic()
    assert (await load(wire, "toads")).ready
    loading, seconds = False, time.monotonic() - began
    assert await running == alone
    # A load that held the loop's thread would be one gap.
    assert len(during) > 3
    assert max(later - earlier for earlier, later in itertools.pairwise(during)) < 0.7 * seconds


@in_one_loop
async def test_an_engine_killed_in_a_load(wire: Wire) -> None:
    """The first death is nobody's, the second is the model's; a running job is never blamed."""
    owls, toads = await pixels(wire, "owls", **LONG), await pixels(wire, "toads")
    await unload(wire, "toads")
    before = restarts(wire)
    running = asyncio.create_task(pixels(wire, "owls", **LONG))
    waits = asyncio.create_task(pixels(wire, "toads"))
    await killed_in_a_load(wire, "toads")
    assert (await waits, await running) == (toads, owls)
    await unload(wire, "toads")
    fails = asyncio.create_task(reason_of(wire.generate(model="toads")))
    for _ in range(2):
        await killed_in_a_load(wire, "toads")
    assert (await fails)[1] == "MODEL_UNUSABLE"
    assert (await listed(wire))["toads"].state == model_pb2.MODEL_STATE_FAILED
    assert await pixels(wire, "owls") == await pixels(wire, "owls")
    assert (await load(wire, "toads")).ready
    assert await pixels(wire, "toads") == toads
    assert restarts(wire) == before + 3


async def test_models_share_the_budget_of_one(folder: Path, configuration: Path) -> None:
    async with serving(folder, budget=1_500_000, configuration=configuration) as wire:
        described = await listed(wire)
        assert 1_000_000 < described["owls"].weight_bytes < 1_500_000
        found = await asyncio.gather(*(pixels(wire, name) for name in [*NAMES] * 3))
        assert found[:3] == found[3:6] == found[6:]
        assert len({picture for (picture,) in found}) == 3
        (resident,) = (id for id, model in (await listed(wire)).items() if model.ready)
        evictions = sum(
            sample.value
            for metric in wire.server.metrics.models.evictions.collect()
            for sample in metric.samples
        )
        assert 2 <= evictions <= 8
        assert await unload(wire, resident) == 0
        assert not any(model.ready for model in (await listed(wire)).values())
        assert await pixels(wire, resident) in found


@in_one_loop
async def test_a_changed_folder_is_seen_and_read_again(wire: Wire, folder: Path) -> None:
    old, revision = await pixels(wire, "fresh", **LONG), (await listed(wire))["fresh"].revision
    file = folder / "fresh" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(file)
    changed = {key: value * 0.9 for key, value in weights.items()}
    safetensors.torch.save_file(changed, file, {"format": "pt"})
    assert (await listed(wire))["fresh"].files_changed
    assert not (await listed(wire))["owls"].files_changed
    started = asyncio.Event()
    loop = asyncio.get_running_loop()

    def watch(event: Event) -> None:
        if isinstance(event, BatchDone) and event.model == "fresh":
            loop.call_soon_threadsafe(started.set)

    wire.engine.on_event = watch
    running = asyncio.create_task(pixels(wire, "fresh", **LONG))
    await started.wait()
    reloaded = await load(wire, "fresh")
    assert await running == old
    assert (reloaded.files_changed, reloaded.ready) == (False, True)
    assert reloaded.revision != revision
    assert await pixels(wire, "fresh", **LONG) != old


@in_one_loop
async def test_a_new_folder_is_found_while_jobs_run_and_a_removed_one_is_forgotten(
    wire: Wire, folder: Path
) -> None:
    alone = await pixels(wire, "owls", **LONG)
    running = asyncio.create_task(pixels(wire, "owls", **LONG))
    (folder / "late").mkdir()
    shutil.copy(folder / "owls" / "model_index.json", folder / "late")
    half = (await listed(wire))["late"]
    assert half.state == model_pb2.MODEL_STATE_FAILED
    assert half.state_reason
    shutil.copytree(folder / "toads", folder / "late", dirs_exist_ok=True)
    models = await listed(wire)
    found = models["late"]
    assert (found.state, found.ready, found.state_reason) == (
        model_pb2.MODEL_STATE_AVAILABLE,
        False,
        "",
    )
    assert (found.defaults, found.schedulers) == (
        models["toads"].defaults,
        models["toads"].schedulers,
    )
    assert found.weight_bytes == pytest.approx(models["toads"].weight_bytes, rel=0.05)
    assert await pixels(wire, "late") == await pixels(wire, "toads") != await pixels(wire, "owls")
    shutil.rmtree(folder / "late")
    assert (await listed(wire))["late"].ready
    await unload(wire, "late")
    while "late" in await listed(wire):
        pass  # Its memory is freed at the end of a batch.
    code, reason, _ = await reason_of(pixels(wire, "late"))
    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL")
    assert await running == alone


@in_one_loop
async def test_a_single_file_is_listed_from_its_keys_and_loaded_on_demand(wire: Wire) -> None:
    before = await listed(wire)
    others = {*NAMES, "later", "short", "fresh", "empty"}
    assert before.keys() - {"gone"} == {*others, "deep/file"}
    file, same = before["deep/file"], before[NAMES[0]]
    assert (file.state, file.ready) == (model_pb2.MODEL_STATE_AVAILABLE, False)
    assert (file.kind, file.defaults) == (same.kind, same.defaults)
    assert file.weight_bytes > 0
    assert await pixels(wire, "deep/file") == await pixels(wire, NAMES[0])
    after = (await listed(wire))["deep/file"]
    assert (after.state, after.ready) == (model_pb2.MODEL_STATE_RESIDENT, True)
    assert file.weight_bytes == pytest.approx(after.weight_bytes, rel=0.05)
