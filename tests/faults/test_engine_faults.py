"""The engine's process is killed, hangs, or gets a poison job: callers still get the same image."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from darkroom.v1 import generation_pb2, image_pb2, model_pb2
from darkroom_server.app import EngineLost
from darkroom_server.backends import process
from darkroom_server.core.events import EngineReady, Event, JobStarted, JobTaken, SampleProgress
from darkroom_server.dispatch.engines import pool
from darkroom_server.settings import Dispatch
from darkroom_server.settings.adapters import Adapters
from tests.engine.adapter_files import write_adapter
from tests.engine.engine_process import FAKE_LOOP
from tests.engine.tiny import write_tiny_model
from tests.server.uploads.pictures import BLUE, WHITE, mask, plain

from .tapped import NOT_SERVING, SERVING, Wire, serving


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def lora_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's folder of adapters, empty at its start."""
    return tmp_path_factory.mktemp("loras")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_wire(tiny_folder: Path, lora_dir: Path) -> AsyncIterator[Wire]:
    """One server whose engine may die often, starts again at once, and gets few jobs at a time."""
    few = Dispatch(max_queued_jobs=64, max_resident_samples=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "FIRST_BACKOFF_SECONDS", 0.001)
        async with serving(
            tiny_folder,
            dispatch=few,
            adapters=Adapters(lora_dir=str(lora_dir)),
            engine_max_restarts=100,
        ) as wire:
            yield wire


@pytest_asyncio.fixture(loop_scope="module")
async def wire(shared_wire: Wire) -> AsyncIterator[Wire]:
    """The shared server, ready and without jobs."""
    await shared_wire.health_becomes(SERVING)
    assert not shared_wire.server.dispatcher.counts.live
    shared_wire.engine.on_event = lambda _: None
    yield shared_wire


@pytest.fixture
async def fake_wire(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Wire]:
    """A server whose engine's process computes nothing."""
    monkeypatch.setattr(process, "CHILD", FAKE_LOOP)
    async with serving(tiny_folder) as wire:
        yield wire


in_one_loop = pytest.mark.asyncio(loop_scope="module")


def pixel_hashes(response: generation_pb2.GenerateResponse) -> list[str]:
    return [image.replay.pixels_sha256 for image in response.images]


MANY = 100
"""Enough steps that a signal arrives before the last one; one step takes milliseconds."""


def signal_once(wire: Wire, moment: Callable[[Event], bool], number: signal.Signals) -> list[Event]:
    """Send the engine a signal at the first event for which ``moment`` holds.

    The event is added to the list that is returned.
    """
    signalled_at: list[Event] = []

    def send_at_moment(event: Event) -> None:
        if not signalled_at and moment(event):
            signalled_at.append(event)
            wire.engine.kill(number)

    wire.engine.on_event = send_at_moment
    return signalled_at


def restarts(wire: Wire) -> int:
    (engine,) = wire.server.dispatcher.snapshot().engines
    return engine.restarts


@in_one_loop
async def test_killed_during_denoising(wire: Wire) -> None:
    before, undisturbed = restarts(wire), await wire.generate(image_count=2, steps=MANY)
    signalled_at = signal_once(wire, lambda e: isinstance(e, SampleProgress), signal.SIGKILL)
    again = await wire.generate(image_count=2, steps=MANY)
    assert (len(signalled_at), restarts(wire) - before) == (1, 1)
    assert pixel_hashes(again) == pixel_hashes(undisturbed)
    assert [i.data for i in again.images] == [i.data for i in undisturbed.images]


@in_one_loop
async def test_killed_during_decoding(wire: Wire) -> None:
    before, undisturbed = restarts(wire), await wire.generate(image_count=3)
    signalled_at = signal_once(
        wire, lambda e: isinstance(e, SampleProgress) and e.step == e.steps, signal.SIGKILL
    )
    assert pixel_hashes(await wire.generate(image_count=3)) == pixel_hashes(undisturbed)
    assert (len(signalled_at), restarts(wire) - before) == (1, 1)


@in_one_loop
async def test_killed_under_an_inpaint_job_with_an_adapter(
    wire: Wire, tiny_folder: Path, lora_dir: Path
) -> None:
    """The engine that starts again gets its image, its mask, and its adapter.

    The adapter was added after the server's start, and is removed while the job runs.
    """
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    write_adapter(lora_dir / "late.safetensors", pipeline)
    await wire.models.AddAdapter(model_pb2.AddAdapterRequest(id="late"))
    picture, other = (image_pb2.ImageInput(data=plain(c, (64, 64))) for c in (BLUE, WHITE))
    fields: dict[str, Any] = {
        "image": picture,
        "mask_image": image_pb2.ImageInput(data=mask((64, 64))),
        "strength": 0.9,
        "steps": MANY,
        "image_count": 2,
        "loras": [generation_pb2.Lora(id="late")],
    }
    undisturbed = [i.data for i in (await wire.generate(**fields)).images]
    for name, value in (("image", other), ("loras", [])):
        changed = await wire.generate(**{**fields, name: value})
        assert not {i.data for i in changed.images} & {*undisturbed}

    before, started, loop = restarts(wire), asyncio.Event(), asyncio.get_running_loop()

    def stop_at_first_step(event: Event) -> None:
        if isinstance(event, SampleProgress) and not started.is_set():
            wire.engine.kill(signal.SIGSTOP)
            loop.call_soon_threadsafe(started.set)

    wire.engine.on_event = stop_at_first_step
    running = asyncio.ensure_future(wire.generate(**fields))
    await started.wait()
    wire.engine.on_event = lambda _: None
    removed = await wire.models.RemoveAdapter(model_pb2.RemoveAdapterRequest(id="late"))
    assert removed.unfinished_jobs == 1
    wire.engine.kill()
    assert [i.data for i in (await running).images] == undisturbed
    assert restarts(wire) - before == 1
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await wire.generate(**fields)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_killed_while_idle(fake_wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "FIRST_BACKOFF_SECONDS", 2.0)
    fake_wire.engine.kill()
    await fake_wire.health_becomes(NOT_SERVING)
    assert await fake_wire.alive()
    call = asyncio.ensure_future(fake_wire.generate())
    assert len((await call).images) == 1
    await fake_wire.health_becomes(SERVING)


async def test_a_hang_is_noticed(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "CHILD", FAKE_LOOP)
    async with serving(tiny_folder, engine_timeout=1.0) as wire:
        undisturbed = await wire.generate(steps=MANY)
        signalled_at = signal_once(wire, lambda e: isinstance(e, SampleProgress), signal.SIGSTOP)
        assert pixel_hashes(await wire.generate(steps=MANY)) == pixel_hashes(undisturbed)
        assert (len(signalled_at), restarts(wire)) == (1, 1)


@in_one_loop
async def test_sixteen_jobs_survive_two_kills(wire: Wire) -> None:
    counts = wire.server.dispatcher.counts
    before = counts.accepted
    undisturbed = {seed: pixel_hashes(await wire.generate(seed=seed)) for seed in range(16)}
    inside: set[str] = set()
    hit: set[str] = set()
    kills, alive = 0, True

    def kill_when_others_run(event: Event) -> None:
        """Each kill hits jobs that no kill has hit before."""
        nonlocal kills, alive
        match event:
            case JobTaken(job_id):
                inside.add(job_id)
            case EngineReady():
                # The last events before a death arrive after the kill.
                hit.update(inside)
                inside.clear()
                alive = True
            case SampleProgress() if kills < 2 and alive and inside - hit:
                kills, alive = kills + 1, False
                wire.engine.kill()

    wire.engine.on_event = kill_when_others_run
    answers = await asyncio.gather(
        *(wire.generate(seed=seed, request_id=f"job-{seed}") for seed in range(16))
    )
    assert kills == 2
    assert {seed: pixel_hashes(answer) for seed, answer in enumerate(answers)} == undisturbed
    assert counts.accepted == counts.ended == before + 32


async def test_a_poison_job_fails_alone(fake_wire: Wire) -> None:
    def poison(event: Event) -> None:
        if isinstance(event, JobStarted) and event.job_id == "poison":
            fake_wire.engine.kill()

    fake_wire.engine.on_event = poison
    others = [asyncio.ensure_future(fake_wire.generate(seed=i, steps=20)) for i in range(4)]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await fake_wire.generate(request_id="poison", steps=MANY)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    failed: Any = caught.value  # The types know the synchronous call only.
    status = rpc_status.from_call(failed)
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    assert info.reason == "ENGINE_CRASHED"
    for other in others:
        assert len((await other).images) == 1


class ExitsOnce:
    """The arguments of the engine's process; with the first ones it exits at once."""

    def __init__(self, real: tuple[str, ...]) -> None:
        self.real = real
        self.times = 0

    def __iter__(self) -> Iterator[str]:
        self.times += 1
        return iter(("-c", "raise SystemExit(1)") if self.times == 1 else self.real)


async def test_an_engine_that_exits_while_it_loads(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = ExitsOnce(FAKE_LOOP)
    monkeypatch.setattr(process, "CHILD", child)
    async with serving(tiny_folder) as wire:
        assert len((await wire.generate()).images) == 1
        assert (child.times, restarts(wire)) == (2, 1)


async def test_a_crash_loop_stops_the_server(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "CHILD", FAKE_LOOP)
    async with serving(tiny_folder, engine_max_restarts=1) as wire:

        def kill_when_ready(event: Event) -> None:
            if isinstance(event, EngineReady):
                wire.engine.kill()

        wire.engine.on_event = kill_when_ready
        wire.engine.kill()
        assert "2 times in ten minutes" in await wire.server.dispatcher.availability.failed()
        with pytest.raises(EngineLost):
            await wire.serve
