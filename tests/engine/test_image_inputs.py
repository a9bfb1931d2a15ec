"""Input images: failures are contained, strengths shorten runs, shared weights stay as they are."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from bench.tiny_families.stable_diffusion_xl import write_sdxl
from darkroom_server.core.engine_config import Dtype
from darkroom_server.core.errors import Reason
from darkroom_server.core.events import JobFailed, JobFinished
from darkroom_server.core.job import SchedulerName, Task
from darkroom_server.engine.conditioning.task_pipelines import task_classes
from darkroom_server.engine.families.registry import FAMILIES
from darkroom_server.engine.pipelines.model import SuspendedModel

from .conftest import LoopUnderTest, config_for, make_job
from .families.image_tasks import mask, picture


@pytest.mark.parametrize("error", [ValueError("injected: secret"), MemoryError("injected")])
def test_an_image_that_cannot_be_encoded_fails_its_own_job(
    own_loop: LoopUnderTest, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    runs = own_loop.models["tiny"].image_runs
    assert runs is not None
    assert runs.images is not None
    vae = runs.images.vae
    encode = vae.encode
    calls: list[int] = []

    def fails_once(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise error
        return encode(*args, **kwargs)

    monkeypatch.setattr(vae, "encode", fails_once, raising=False)
    text = make_job("text")
    doomed, fine = (make_job(name, image=picture(1), strength=0.8) for name in ("doomed", "fine"))
    ends = own_loop.run(doomed, text, fine)
    failed = ends["doomed"]
    assert isinstance(failed, JobFailed)
    if isinstance(error, MemoryError):
        assert failed.failure.reason is Reason.OUT_OF_MEMORY
    else:
        assert failed.failure.message == "the input image could not be encoded"
    assert isinstance(ends["text"], JobFinished)
    assert isinstance(ends["fine"], JobFinished)


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if {*f.tasks} - {Task.EDIT}])
def test_the_steps_taken_are_those_of_diffusers(name: str) -> None:
    family = FAMILIES[name]
    classes = task_classes(family.tasks)
    assert classes.keys() == family.tasks.keys()
    differs = False
    for pipeline_class in classes.values():
        for steps in range(1, 31):
            for strength in (0.01, 0.1, 0.3, 0.55, 0.6, 0.7, 0.9, 0.9999, 1.0):
                scheduler = SimpleNamespace(timesteps=torch.arange(steps), order=1)
                pipeline = SimpleNamespace(scheduler=scheduler)
                left, _ = pipeline_class.get_timesteps(pipeline, steps, strength, "cpu")
                assert family.strength_rounding.steps_taken(steps, strength) == len(left)
                differs |= len(left) != steps
    assert differs


def test_a_strength_that_leaves_no_step_has_no_denoiser_calls(shared_loop: LoopUnderTest) -> None:
    info = shared_loop.models["tiny"].info
    for scheduler in (SchedulerName.DDIM, SchedulerName.PNDM, SchedulerName.HEUN):
        job = make_job("short", image=picture(1), strength=0.1, steps=6, scheduler=scheduler)
        assert info.denoiser_calls(job) == 0
        assert info.denoiser_calls(make_job("text", steps=6, scheduler=scheduler)) > 0


def test_pipelines_share_the_weights_and_do_not_convert_them(tmp_path: Path) -> None:
    loop = LoopUnderTest(config_for(write_sdxl(tmp_path), dtype=Dtype.BFLOAT16))
    try:
        model: Any = loop.models["tiny"]
        assert isinstance(model, SuspendedModel)
        hosts = model.runs.hosts
        assert set(hosts) == {Task.TEXT_TO_IMAGE, Task.IMAGE_TO_IMAGE, Task.INPAINT}
        weights = [
            {name: [w.data_ptr() for w in part.parameters()] for name, part in parts.items()}
            for parts in (
                {n: p for n, p in vars(host._template).items() if isinstance(p, torch.nn.Module)}
                for host in hosts.values()
            )
        ]
        assert weights[0] == weights[1] == weights[2]
        assert weights[0]["unet"]
        vae = model.runs.host._template.vae
        assert isinstance(vae, diffusers.AutoencoderKL)
        assert vae.config.force_upcast
        fields: dict[str, Any] = {"image": picture(1), "scheduler": SchedulerName.EULER}
        jobs = [make_job("image", **fields), make_job("mask", mask_image=mask(32), **fields)]
        ends = loop.run(*jobs)
        assert all(isinstance(end, JobFinished) for end in ends.values()), ends
        assert {weight.dtype for weight in vae.parameters()} == {torch.float32}
        assert {weight.dtype for weight in model.runs.host._template.unet.parameters()} == {
            torch.bfloat16
        }
    finally:
        loop.close()
