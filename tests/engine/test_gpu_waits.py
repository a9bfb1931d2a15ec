"""What the host waits for on a make-believe CUDA device, batch by batch."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from darkroom_server.core.engine_config import Preset
from darkroom_server.core.events import (
    BatchDone,
    Event,
    JobCancelled,
    JobFinished,
    SampleProgress,
)
from darkroom_server.core.job import Job, SchedulerName
from darkroom_server.engine.batch import Batch
from darkroom_server.engine.batching.runner import BatchResult, Runner
from darkroom_server.engine.loading.startup import start_loop
from darkroom_server.engine.loop import EngineLoop

from .conftest import End, make_job
from .fake_cuda import FakeDevice, FakeEvent, Kind, fake_cuda
from .test_gpu_path import on_gpu
from .test_schedulers import SD_SCHEDULERS

pytestmark = pytest.mark.usefixtures("one_thread")


class Served:
    """A model on the device, whose loops run jobs until they end."""

    def __init__(self, folder: Path, preset: Preset) -> None:
        self.loop: EngineLoop
        self.running: set[str] = set()
        made, _ = start_loop(on_gpu(folder, preset), self.emit)
        self.models, self.caches = made._models, made._caches

    def emit(self, event: Event) -> None:
        if isinstance(event, End):
            assert isinstance(event, JobFinished), event
            self.running.remove(event.job_id)
            if not self.running:
                self.loop.close()

    def run(self, *jobs: Job) -> None:
        self.loop = EngineLoop(self.models, self.emit, self.caches)
        self.running = {job.id for job in jobs}
        for job in jobs:
            self.loop.submit(job)
        self.loop.run()


@pytest.fixture(scope="module")
def device(tiny_folder: Path) -> Iterator[FakeDevice]:
    """One for all tests; the model's files are written before it is there."""
    with fake_cuda() as made:
        yield made


@pytest.fixture(scope="module")
def shared(tiny_folder: Path, device: FakeDevice) -> Served:
    return Served(tiny_folder, Preset.FAST)


@pytest.fixture
def fast(shared: Served, device: FakeDevice) -> Served:
    """The shared model as after its load: the device is idle, and no prompt is cached."""
    torch.cuda.synchronize()
    shared.models["tiny"].clear_prompt_cache()
    device.reset_counts()
    return shared


Waits = Counter[tuple[Kind, str, bool]]


def per_batch(served: Served, device: FakeDevice, scheduler: SchedulerName) -> Waits:
    """The traffic of one more batch of two samples: kind, file, and whether the host waits."""
    few, many = 6, 10
    info = served.models["tiny"].info

    def jobs(steps: int) -> list[Job]:
        fields: dict[str, Any] = {"steps": steps, "scheduler": scheduler}
        return [make_job(f"{steps}-{i}", seed=i, **fields) for i in range(2)]

    def counted(steps: int) -> Waits:
        device.reset_counts()
        served.run(*jobs(steps))
        return Counter(
            (each.kind, each.where.rpartition(":")[0], each.blocking) for each in device.traffic
        )

    counted(few)  # The prompts are cached from now on.
    more = counted(many)
    more.subtract(counted(few))
    batches = info.denoiser_calls(jobs(many)[0]) - info.denoiser_calls(jobs(few)[0])
    assert all(count % batches == 0 for count in more.values()), more
    return Counter({each: count // batches for each, count in more.items() if count})


SENT = (Kind.TO_DEVICE, "engine/device/transfer.py", False)
BATCH_BEFORE = (Kind.SYNC, "engine/device/timer.py", True)


@pytest.mark.parametrize("scheduler", SD_SCHEDULERS)
def test_a_batch_waits_for_the_one_before_and_for_nothing_else(
    fast: Served, device: FakeDevice, scheduler: SchedulerName
) -> None:
    """One copy before the denoiser, with the timesteps, and one for the steps after it."""
    assert per_batch(fast, device, scheduler) == {SENT: 2, BATCH_BEFORE: 1}


def test_the_next_batch_is_launched_before_the_last_one_is_awaited(
    fast: Served, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind: list[int] = []
    run = Runner.run

    def noted(self: Runner, batch: Batch) -> BatchResult:
        behind.append(device.recorded_events - device.awaited_events)
        return run(self, batch)

    monkeypatch.setattr(Runner, "run", noted)
    fast.run(make_job("a", steps=6))
    # Each batch has two events, and so have the prompts before the first one.
    assert behind == [2, 4, 2, 2, 2, 2]


def test_the_seconds_of_a_batch_are_its_own(
    fast: Served, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of the next one, after whose launch it is published."""
    events: list[Event] = []
    ends: list[float] = []
    run, emit = Runner.run, fast.emit

    def noted(self: Runner, batch: Batch) -> BatchResult:
        result = run(self, batch)
        ends.append(float(device.recorded_events))
        return result

    def kept(event: Event) -> None:
        events.append(event)
        emit(event)

    monkeypatch.setattr(FakeEvent, "elapsed_time", lambda _, end: 1000.0 * end.number)
    monkeypatch.setattr(Runner, "run", noted)
    monkeypatch.setattr(fast, "emit", kept)
    fast.run(make_job("a", steps=5))
    batches = [event for event in events if isinstance(event, BatchDone)]
    steps = [event for event in events if isinstance(event, SampleProgress)]
    assert [batch.seconds for batch in batches] == ends
    assert [step.seconds for step in steps] == ends
    assert [step.step for step in steps] == [1, 2, 3, 4, 5]


def test_a_job_cancelled_meanwhile_gets_no_step_after_its_end(
    fast: Served, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    emit = fast.emit

    def cancelling(event: Event) -> None:
        events.append(event)
        if isinstance(event, SampleProgress) and (event.job_id, event.step) == ("b", 2):
            fast.loop.cancel("b")
        if isinstance(event, JobCancelled):
            fast.running.discard(event.job_id)
        else:
            emit(event)

    monkeypatch.setattr(fast, "emit", cancelling)
    fast.run(make_job("a", steps=8), make_job("b", steps=8))
    of_b = [e for e in events if isinstance(e, SampleProgress | JobCancelled) and e.job_id == "b"]
    assert isinstance(of_b[-1], JobCancelled)
    assert of_b[-1].wasted_seconds > 0
    assert len(of_b) < 8
