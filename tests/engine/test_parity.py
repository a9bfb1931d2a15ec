"""The images equal diffusers' own, whatever shares their batches."""

from pathlib import Path

import numpy as np
import pytest
import torch

from darkroom_server.core.job import Job, SchedulerName

from .conftest import LoopUnderTest, config_for, make_job
from .reference import Reference
from .test_schedulers import SD_SCHEDULERS
from .tiny import write_tiny_model


@pytest.fixture(scope="session")
def reference(tiny_folder: Path) -> Reference:
    return Reference(tiny_folder)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def busy_mix(scheduler: SchedulerName) -> list[Job]:
    """Jobs that share batches with one of every other scheduler, all settings mixed."""
    jobs = []
    for i, (steps, guidance, width) in enumerate(
        [(5, 1.0, 64), (25, 12.0, 64), (13, 7.5, 72), (8, 4.0, 64)]
    ):
        jobs.append(
            make_job(
                f"{scheduler}-{i}",
                scheduler=scheduler,
                steps=steps,
                guidance_scale=guidance,
                width=width,
                seed=100 + i,
                prompt=("a red ring", "a small heart on a white background")[i % 2],
                negative_prompt=("", "blue")[i % 2],
            )
        )
    others = [name for name in SD_SCHEDULERS if name != scheduler][:5]
    jobs += [make_job(f"{scheduler}-with-{o}", scheduler=o, steps=11) for o in others]
    return jobs


@pytest.mark.parametrize("scheduler", SD_SCHEDULERS)
def test_final_latents_equal_the_pipelines(
    scheduler: SchedulerName, shared_loop: LoopUnderTest, reference: Reference
) -> None:
    jobs = busy_mix(scheduler)
    shared_loop.run(*jobs)
    for job in jobs[:4]:
        error = relative_error(shared_loop.latents[job.id, 0], reference.latents(job))
        assert error <= 1e-4, (job, error)


@pytest.mark.parametrize("scheduler", SD_SCHEDULERS)
def test_exact_image_bytes_equal_the_pipelines(
    scheduler: SchedulerName, shared_loop: LoopUnderTest, reference: Reference
) -> None:
    job = make_job(f"exact-{scheduler}", scheduler=scheduler, exact=True, image_count=2)
    crowd = [make_job(f"crowd-{scheduler}-{i}", seed=i, steps=9) for i in range(5)]
    shared_loop.run(job, *crowd)
    for index in range(2):
        data = shared_loop.image(job.id, index).image.data
        found = np.frombuffer(data, np.uint8).reshape(job.height, job.width, 3)
        wanted = reference.pixels(job, index)
        assert np.abs(found.astype(int) - wanted.astype(int)).max() == 0


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_spacings_and_predictions(spacing: str, prediction: str, tmp_path: Path) -> None:
    folder = write_tiny_model(
        tmp_path, timestep_spacing=spacing, prediction_type=prediction, skip_prk_steps=True
    )
    reference = Reference(folder)
    loop = LoopUnderTest(config_for(folder))
    try:
        jobs = [make_job(name, scheduler=name, steps=7) for name in SD_SCHEDULERS]
        loop.run(*jobs)
        for job in jobs:
            error = relative_error(loop.latents[job.id, 0], reference.latents(job))
            assert error <= 1e-4, (job.scheduler, error)
    finally:
        loop.close()
