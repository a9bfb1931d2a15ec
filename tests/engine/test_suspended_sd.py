"""Stable Diffusion by the engine's own loop and by suspended runs of diffusers' pipeline."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.inprocess.suspended_sd import suspended_stable_diffusion
from darkroom_server.core.errors import Reason
from darkroom_server.core.events import JobFailed, JobFinished
from darkroom_server.core.job import Job, SchedulerName
from darkroom_server.engine.batching import runner
from darkroom_server.engine.pipelines.model import SuspendedModel
from darkroom_server.engine.stepping.merged_step import LinearStep, take_steps

from .conftest import LoopUnderTest, config_for, make_job

VAE_SCALE = 0.18215
"""What the VAE's latents are multiplied with for the scheduler."""


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


@pytest.fixture
def merged(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps each product took together."""
    counts: list[int] = []

    def count(steps: Sequence[LinearStep]) -> list[torch.Tensor]:
        counts.append(len(steps))
        return take_steps(steps)

    monkeypatch.setattr(runner, "take_steps", count)
    return counts


def test_both_forms_merge_their_steps_and_agree(
    shared_loop: LoopUnderTest, suspended_loop: LoopUnderTest, merged: list[int]
) -> None:
    jobs = crowd(exact=False)
    products = []
    for loop in (shared_loop, suspended_loop):
        loop.run(*jobs)
        products.append(list(merged))
        merged.clear()
    assert all(max(each) == len(jobs) for each in products), products
    latents = [[loop.latents[job.id, 0] for job in jobs] for loop in (shared_loop, suspended_loop)]
    # The hand-written loop's latents have the scale of what the scheduler steps.
    by_hand, suspended = latents[0], [each * VAE_SCALE for each in latents[1]]
    for found, wanted in zip(by_hand, suspended, strict=True):
        assert (found - wanted).norm() / wanted.norm() <= 1e-5
    assert (by_hand[0] - suspended[1]).norm() / suspended[1].norm() > 1e-3, "the control"


def test_exact_jobs_merge_no_steps(
    shared_loop: LoopUnderTest, suspended_loop: LoopUnderTest, merged: list[int]
) -> None:
    jobs = [replace(job, id=f"{job.id} again") for job in crowd(exact=True)]
    for loop in (shared_loop, suspended_loop):
        loop.run(*jobs)
    assert merged == []


@pytest.mark.parametrize("form", ["by hand", "suspended"])
def test_a_product_that_fails_is_split_down_to_one_job(
    form: str,
    shared_loop: LoopUnderTest,
    suspended_loop: LoopUnderTest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs = [replace(job, id=f"{job.id} {form}") for job in crowd(exact=False)]
    doomed = jobs[1]

    def fail(steps: Sequence[LinearStep]) -> list[torch.Tensor]:
        # Latents, one prediction and noise: only this job has neither guidance nor kept tensors.
        if any(step.matrix.shape == (1, 3) and len(step.inputs) == 3 for step in steps):
            raise ValueError("injected")
        return take_steps(steps)

    monkeypatch.setattr(runner, "take_steps", fail)
    loop = shared_loop if form == "by hand" else suspended_loop
    ends = loop.run(*jobs)
    failed = ends[doomed.id]
    assert isinstance(failed, JobFailed)
    assert failed.failure.reason is Reason.SCHEDULER_FAILED
    assert all(isinstance(ends[job.id], JobFinished) for job in jobs if job is not doomed)


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
