"""Stable Diffusion by the engine's own loop and by suspended runs of diffusers' pipeline."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.inprocess.suspended_sd import suspended_stable_diffusion
from darkroom_server.core.job import Job, SchedulerName
from darkroom_server.engine.pipelines.model import SuspendedModel

from .conftest import LoopUnderTest, config_for, make_job


@pytest.fixture(scope="module")
def suspended_loop(tiny_folder: Path) -> Iterator[LoopUnderTest]:
    with suspended_stable_diffusion():
        loop = LoopUnderTest(config_for(tiny_folder))
    model: Any = loop.models["tiny"]
    assert isinstance(model, SuspendedModel)
    yield loop
    loop.close()


def crowd(exact: bool) -> list[Job]:
    schedulers = (SchedulerName.DDIM, SchedulerName.EULER_ANCESTRAL, SchedulerName.DPMPP_2M)
    return [
        make_job(
            f"crowd {i} {exact}",
            scheduler=scheduler,
            steps=5 + i,
            guidance_scale=(5.0, 1.0, 7.5)[i],
            negative_prompt=("", "red", "blue")[i],
            seed=i,
            exact=exact,
        )
        for i, scheduler in enumerate(schedulers)
    ]


def test_exact_images_have_the_same_bytes(
    shared_loop: LoopUnderTest, suspended_loop: LoopUnderTest
) -> None:
    jobs = crowd(exact=True)
    for loop in (shared_loop, suspended_loop):
        loop.run(*jobs)
    images = [
        [loop.image(job.id).image.data for job in jobs] for loop in (shared_loop, suspended_loop)
    ]
    assert images[0] == images[1]
    assert len(set(images[0])) == len(jobs)
    other = replace(jobs[0], id="another seed", seed=99)
    suspended_loop.run(other)
    assert suspended_loop.image(other.id).image.data not in images[0], "the control"
