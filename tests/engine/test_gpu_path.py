"""The GPU path on a make-believe CUDA device: what runs, and what it waits for."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from darkroom_server.core.engine_config import EngineConfig, ModelSource, Preset
from darkroom_server.core.events import (
    BatchDone,
    Event,
    JobCancelled,
    JobFinished,
    PreviewReady,
    SampleProgress,
)
from darkroom_server.core.job import Job, SchedulerName
from darkroom_server.engine.batch import Batch
from darkroom_server.engine.batching.runner import BatchResult, Runner
from darkroom_server.engine.loading.startup import start_loop
from darkroom_server.engine.loop import EngineLoop

from .conftest import MEASUREMENTS, End, make_job, run_here
from .fake_cuda import CUDA, CudaTensor, FakeDevice, FakeEvent, Kind
from .test_schedulers import SD_SCHEDULERS

pytestmark = pytest.mark.usefixtures("one_thread")


def on_gpu(folder: Path, preset: Preset, **fields: Any) -> EngineConfig:
    return EngineConfig(
        models=(ModelSource(id="tiny", location=str(folder)),),
        measurement_cache=MEASUREMENTS.name,
        **{"device": "cuda", "preset": preset, "rows": 4, **fields},
    )


def ends(events: list[Event]) -> list[type[End]]:
    return [type(event) for event in events if isinstance(event, End)]


# ---- the device itself ----


def test_mixing_devices_raises_as_on_a_gpu(cuda: FakeDevice) -> None:
    here, there = torch.ones(3), torch.ones(3).to("cuda")
    assert isinstance(there, CudaTensor)
    assert there.device == CUDA
    with pytest.raises(RuntimeError, match="at least two devices"):
        here + there
    with pytest.raises(RuntimeError, match="at least two devices"):
        torch.cat([here, there])
    with pytest.raises(RuntimeError, match="indices should be either on cpu"):
        here[there.long()]
    with pytest.raises(TypeError, match=r"Use Tensor\.cpu"):
        there.numpy()
    # A scalar of the CPU goes with anything.
    assert (there * torch.tensor(2.0)).cpu().tolist() == [2.0, 2.0, 2.0]


def test_copies_and_waits_are_counted_with_their_lines(cuda: FakeDevice) -> None:
    there = torch.ones(3).to("cuda")
    assert bool(there[0] > 0)
    torch.ones(3).pin_memory().to("cuda", non_blocking=True)
    torch.ones(3).to("cuda", non_blocking=True)
    there.cpu()
    kinds = [(each.kind, each.blocking) for each in cuda.traffic]
    to_device, to_host = Kind.TO_DEVICE, Kind.TO_HOST
    assert kinds == [
        (to_device, True),
        (Kind.SYNC, True),
        (to_device, False),
        # Memory that can be paged out is copied by the host.
        (to_device, True),
        (to_host, True),
    ]
    assert {each.where.rpartition(":")[0].rpartition("/")[2] for each in cuda.traffic} == {
        Path(__file__).name
    }


def test_live_bytes_follow_the_tensors(cuda: FakeDevice) -> None:
    before = cuda.live_bytes
    made = torch.zeros(1 << 20, dtype=torch.float16, device="cuda")
    part = made[:10]
    assert cuda.live_bytes - before == 2 << 20
    del made
    assert cuda.live_bytes - before == 2 << 20, "the view keeps it alive"
    del part
    assert cuda.live_bytes == before
    assert torch.cuda.max_memory_allocated() == before + (2 << 20)
    cuda.total_bytes = cuda.live_bytes + 100
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(101, device="cuda")


# ---- everything runs on it ----


FEW = [SchedulerName.PNDM, SchedulerName.EULER_ANCESTRAL, SchedulerName.DPMPP_2M]


@pytest.mark.parametrize(
    ("preset", "schedulers"),
    [(Preset.FAST, SD_SCHEDULERS), (Preset.FRUGAL, FEW), (Preset.TINY, FEW)],
)
def test_a_preset_generates(
    preset: Preset, schedulers: list[SchedulerName], tiny_folder: Path, cuda: FakeDevice
) -> None:
    jobs = [
        make_job(name, scheduler=name, steps=4, guidance_scale=(1.0, 5.0)[i % 2], preview_every=1)
        for i, name in enumerate(schedulers)
    ]
    ready, events = run_here(on_gpu(tiny_folder, preset), *jobs)
    assert ready.models[0].runtime.device == "cuda:0"
    assert ends(events) == [JobFinished] * len(jobs)
    previewed = {event.job_id for event in events if isinstance(event, PreviewReady)}
    assert previewed == {job.id for job in jobs}


# ---- what a batch waits for ----


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


@pytest.fixture
def fast(tiny_folder: Path, cuda: FakeDevice) -> Served:
    return Served(tiny_folder, Preset.FAST)


Waits = Counter[tuple[Kind, str, bool]]


def per_batch(served: Served, cuda: FakeDevice, scheduler: SchedulerName) -> Waits:
    """The traffic of one more batch of two samples: kind, file, and whether the host waits."""
    few, many = 6, 10
    info = served.models["tiny"].info

    def jobs(steps: int) -> list[Job]:
        fields: dict[str, Any] = {"steps": steps, "scheduler": scheduler}
        return [make_job(f"{steps}-{i}", seed=i, **fields) for i in range(2)]

    def counted(steps: int) -> Waits:
        cuda.reset_counts()
        served.run(*jobs(steps))
        return Counter(
            (each.kind, each.where.rpartition(":")[0], each.blocking) for each in cuda.traffic
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
    fast: Served, cuda: FakeDevice, scheduler: SchedulerName
) -> None:
    """One copy before the denoiser, with the timesteps, and one for the steps after it."""
    assert per_batch(fast, cuda, scheduler) == {SENT: 2, BATCH_BEFORE: 1}


def test_the_next_batch_is_launched_before_the_last_one_is_awaited(
    fast: Served, cuda: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind: list[int] = []
    run = Runner.run

    def noted(self: Runner, batch: Batch) -> BatchResult:
        behind.append(cuda.recorded_events - cuda.awaited_events)
        return run(self, batch)

    monkeypatch.setattr(Runner, "run", noted)
    fast.run(make_job("a", steps=6))
    # Each batch has two events, and so have the prompts before the first one.
    assert behind == [2, 4, 2, 2, 2, 2]


def test_the_seconds_of_a_batch_are_its_own(
    fast: Served, cuda: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of the next one, after whose launch it is published."""
    events: list[Event] = []
    ends: list[float] = []
    run, emit = Runner.run, fast.emit

    def noted(self: Runner, batch: Batch) -> BatchResult:
        result = run(self, batch)
        ends.append(float(cuda.recorded_events))
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
    fast: Served, cuda: FakeDevice, monkeypatch: pytest.MonkeyPatch
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
