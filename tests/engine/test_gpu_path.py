"""The GPU path on a make-believe CUDA device: the device itself, and everything runs on it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from darkroom_server.core.engine_config import EngineConfig, ModelSource, Preset
from darkroom_server.core.events import Event, JobFinished, PreviewReady
from darkroom_server.core.job import SchedulerName

from .conftest import MEASUREMENTS, End, make_job, run_here
from .fake_cuda import CUDA, CudaTensor, FakeDevice, Kind
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
