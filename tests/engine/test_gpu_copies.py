"""Copies to a GPU: two for each batch, whatever schedulers and families share it."""

from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from bench.inprocess.suspended_sd import suspended_stable_diffusion
from bench.tiny_families import ONE_EACH
from bench.tiny_families.case import FamilyCase
from darkroom_server.core.engine_config import Preset
from darkroom_server.core.events import ImageReady, JobFinished, PreviewReady
from darkroom_server.core.job import SchedulerName
from darkroom_server.engine.batch import Batch
from darkroom_server.engine.batching.runner import BatchResult, Runner
from darkroom_server.engine.device.transfer import send, send_together
from darkroom_server.engine.stepping.merged_step import LinearStep, take_steps

from .conftest import End, make_job, run_here
from .fake_cuda import FakeDevice, Kind, Traffic
from .test_gpu_path import on_gpu
from .test_schedulers import SD_SCHEDULERS
from .tiny import SIZE

pytestmark = pytest.mark.usefixtures("one_thread")

OF_DIFFUSERS = {
    "AuraFlow": 1,
    "Chroma": 1,
    "FLUX.2 dev": 3,
    "HiDream": 17,
    "HunyuanImage": 8,
    "Lumina 2": 4,
    "PixArt-Sigma": 1,
    "Qwen-Image": 2,
}
"""What lines of diffusers copy or wait for, at most, for each sample of a batch."""

WITHOUT_PREVIEWS = {"HunyuanImage", "Sana"}
"""Their VAE has nothing that a preview could be fitted to."""

Batches = list[tuple[int, Counter[Traffic]]]
"""Of each batch: its samples, and what it copied or waited for."""


@pytest.fixture
def batches(cuda: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> Batches:
    found: Batches = []
    run = Runner.run

    def noted(self: Runner, batch: Batch) -> BatchResult:
        before = len(cuda.traffic)
        result = run(self, batch)
        # Previews, which few steps have, may copy more.
        if all(sample.predicted_x0 is None for sample in result.stepped):
            found.append((len(batch.samples), Counter(cuda.traffic[before:])))
        return result

    monkeypatch.setattr(Runner, "run", noted)
    return found


def check(batches: Batches, together: int) -> None:
    """At most two copies in each batch, and nothing that the host waits for."""
    assert max(samples for samples, _ in batches) == together
    for samples, traffic in batches:
        assert traffic.total() <= 2, (samples, traffic)
        for each in traffic:
            assert (each.kind, each.blocking) == (Kind.TO_DEVICE, False), str(each)
            assert each.where.startswith("engine/device/transfer.py"), str(each)


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


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)
def test_a_family_generates(case: FamilyCase, tmp_path: Path, batches: Batches) -> None:
    side = 128 if case.name == "HiDream" else SIZE  # Its pipeline knows no other area.
    fields = {**case.jobs[0], "width": side, "height": side, "preview_every": 2}
    fields["scheduler"] = SchedulerName.MODEL
    jobs = [make_job(str(i), **{**fields, "seed": i}) for i in range(2)]
    ready, events = run_here(on_gpu(case.write(tmp_path), Preset.FAST, rows=8), *jobs)
    assert ready.models[0].runtime.device == "cuda:0"
    assert [type(e) for e in events if isinstance(e, End)] == [JobFinished] * 2
    images = [event.image for event in events if isinstance(event, ImageReady)]
    assert all(len(set(image.data)) > 8 for image in images), "no flat picture"
    previewed = {event.job_id for event in events if isinstance(event, PreviewReady)}
    has_previews = case.name not in WITHOUT_PREVIEWS
    assert has_previews == ("preview" in ready.models[0].optional_fields)
    assert previewed == ({job.id for job in jobs} if has_previews else set())
    theirs = [
        sum(n for each, n in seen.items() if each.where.startswith("diffusers/")) / samples
        for samples, seen in batches
    ]
    assert max(theirs) <= OF_DIFFUSERS.get(case.name, 0)
    # Positions of pixels and tokens must be equal in a batch: one wait compares them, and those of
    # a new image are read.
    reads = "engine/pipelines/arguments.py"
    own = []
    for samples, seen in batches:
        waits = {e: n for e, n in seen.items() if e.where.startswith(reads)}
        assert sum(n for e, n in waits.items() if e.kind is Kind.SYNC) <= 1
        others = (e for e in seen if e not in waits and not e.where.startswith("diffusers/"))
        own.append((samples, Counter({e: seen[e] for e in others})))
    check(own, 2)


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
