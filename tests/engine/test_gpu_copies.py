"""Copies to a GPU: two for each batch, whatever schedulers and families share it."""

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from bench.inprocess.suspended_sd import suspended_stable_diffusion
from darkroom_server.core.engine_config import Preset
from darkroom_server.core.events import JobFinished
from darkroom_server.core.job import SchedulerName
from darkroom_server.engine.batch import Batch
from darkroom_server.engine.batching.runner import BatchResult, Runner
from darkroom_server.engine.device.transfer import send, send_together
from darkroom_server.engine.stepping.merged_step import LinearStep, take_steps

from .conftest import End, make_job, run_here
from .fake_cuda import FakeDevice, Kind
from .families.case import FamilyCase
from .test_gpu_path import FAMILIES, on_gpu
from .test_schedulers import SD_SCHEDULERS
from .tiny import SIZE

Batches = list[tuple[int, Counter[str]]]
"""Of each batch: its samples, and what it copied or waited for."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def batches(cuda: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> Batches:
    found: Batches = []
    run = Runner.run

    def noted(self: Runner, batch: Batch) -> BatchResult:
        before = len(cuda.traffic)
        result = run(self, batch)
        found.append((len(batch.samples), Counter(map(str, cuda.traffic[before:]))))
        return result

    monkeypatch.setattr(Runner, "run", noted)
    return found


def check(batches: Batches, together: int) -> None:
    """At most two copies in each batch, and nothing that the host waits for."""
    assert max(samples for samples, _ in batches) == together
    for samples, traffic in batches:
        assert traffic.total() <= 2, (samples, traffic)
        sent = f"{Kind.TO_DEVICE} (_to_copy, not waited for): engine/device/transfer.py"
        assert all(each.startswith(sent) for each in traffic), (samples, traffic)


@pytest.mark.parametrize("by_hand", [True, False], ids=["by hand", "suspended"])
def test_all_schedulers_in_one_batch(by_hand: bool, tiny_folder: Path, batches: Batches) -> None:
    jobs = [
        make_job(name, scheduler=name, steps=4, guidance_scale=(1.0, 5.0)[i % 2])
        for i, name in enumerate(SD_SCHEDULERS)
    ]
    with nullcontext() if by_hand else suspended_stable_diffusion():
        _, events = run_here(on_gpu(tiny_folder, Preset.FAST, rows=64), *jobs)
    assert [type(e) for e in events if isinstance(e, End)] == [JobFinished] * len(jobs)
    check(batches, len(jobs))


@pytest.mark.parametrize("case", FAMILIES.values(), ids=lambda case: case.name)
def test_a_familys_batch(case: FamilyCase, tmp_path: Path, batches: Batches) -> None:
    side = 128 if case.name == "HiDream" else SIZE  # Its pipeline knows no other area.
    fields = {**case.jobs[0], "width": side, "height": side, "scheduler": SchedulerName.MODEL}
    jobs = [make_job(str(i), **{**fields, "seed": i}) for i in range(2)]
    _, events = run_here(on_gpu(case.write(tmp_path), Preset.FAST, rows=8), *jobs)
    assert [type(e) for e in events if isinstance(e, End)] == [JobFinished] * 2
    check(batches, 2)


def test_tensors_of_one_copy_keep_their_values_and_dtypes(cuda: FakeDevice) -> None:
    device = torch.device("cuda")
    there = send(torch.arange(3.0), device)
    tensors = [
        torch.arange(5, dtype=torch.float16),
        there,
        torch.arange(6.0).view(2, 3).t(),
        torch.tensor(7.0),
        torch.zeros(0),
        torch.arange(4, dtype=torch.int64),
    ]
    cuda.reset_counts()
    sent = send_together(tensors, device)
    assert [(each.kind, each.blocking) for each in cuda.traffic] == [(Kind.TO_DEVICE, False)]
    assert sent[1] is there
    for given, found in zip(tensors, sent, strict=True):
        assert (found.device, found.dtype) == (there.device, given.dtype)
        assert torch.equal(found.cpu(), given.cpu())
    cuda.reset_counts()
    assert send_together([there], device) == [there]
    assert not cuda.traffic


def test_on_a_cpu_nothing_is_copied() -> None:
    tensors = [torch.ones(2), torch.ones(3)]
    sent = send_together(tensors, torch.device("cpu"))
    assert all(a is b for a, b in zip(sent, tensors, strict=True))


def test_steps_on_a_device_are_those_on_the_cpu(cuda: FakeDevice) -> None:
    def steps(device: str) -> list[LinearStep]:
        random = torch.Generator().manual_seed(1)

        def numbers(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=random)

        return [
            LinearStep(
                numbers(1 + kept, 3 + kept),
                (
                    numbers(1 + kept, 16).to(device),
                    numbers(1, 16).half().to(device),
                    numbers(1, 16).half(),  # Noise, on the CPU.
                ),
            )
            for kept in (0, 2, 0, 1, 2)
        ]

    here = steps("cpu")
    wanted = take_steps(here)
    there = steps("cuda")
    cuda.reset_counts()
    found = take_steps(there)
    assert [each.kind for each in cuda.traffic] == [Kind.TO_DEVICE]
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.cpu(), other)
    assert not torch.equal(wanted[0], wanted[2]), "the control"
