"""With random joins and cancels, the images are still right."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from darkroom_server.core.events import JobCancelled, JobFinished, SampleProgress
from darkroom_server.core.job import Job

from .conftest import LoopUnderTest, make_job
from .reference import Reference
from .test_schedulers import SD_SCHEDULERS

names = itertools.count()

plans = st.lists(
    st.fixed_dictionaries(
        {
            "scheduler": st.sampled_from(SD_SCHEDULERS),
            "steps": st.integers(5, 24),
            "guidance_scale": st.sampled_from([1.0, 1.5, 4.0, 7.5, 12.0]),
            "width": st.sampled_from([64, 64, 72]),
            "height": st.sampled_from([64, 64, 96]),
            "seed": st.integers(0, 2**63 - 1),
            "image_count": st.integers(1, 2),
            "prompt": st.sampled_from(["", "a red ring", "a small heart 😀", "blue " * 50]),
            "exact": st.booleans(),
        }
    ),
    min_size=2,
    max_size=6,
)
# Of each job: after how many steps of any job it is submitted, and cancelled (if at all).
moments = st.lists(
    st.tuples(st.integers(0, 25), st.none() | st.integers(0, 40)), min_size=6, max_size=6
)


@pytest.fixture(scope="module")
def reference(tiny_folder: Path) -> Reference:
    return Reference(tiny_folder)


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(plans=plans, moments=moments)
def test_any_schedule(
    shared_loop: LoopUnderTest,
    reference: Reference,
    plans: list[dict[str, object]],
    moments: list[tuple[int, int | None]],
) -> None:
    jobs = [make_job(f"random-{next(names)}", **plan) for plan in plans]
    timeline: list[tuple[int, str, Job]] = []
    for job, (joins, leaves) in zip(jobs, moments, strict=False):
        timeline.append((joins, "submit", job))
        if leaves is not None:
            timeline.append((joins + leaves, "cancel", job))
    timeline.sort(key=lambda entry: (entry[0], entry[1] != "submit"))
    steps = 0

    def act(event: object) -> None:
        nonlocal steps
        if not isinstance(event, SampleProgress):
            return  # Some are emitted by other threads.
        steps += 1
        while timeline and timeline[0][0] <= steps:
            _, what, job = timeline.pop(0)
            if what == "submit":
                shared_loop.loop.submit(job)
            else:
                shared_loop.loop.cancel(job.id)

    shared_loop.on_event = act
    starter = make_job(f"starter-{next(names)}", steps=60)
    try:
        shared_loop.run(starter)
        for _, what, job in timeline:
            if what == "submit":
                shared_loop.loop.submit(job)
        shared_loop.wait_for(lambda: all(job.id in shared_loop.ends for job in jobs))
    finally:
        shared_loop.on_event = lambda _: None
    for job, (_, leaves) in zip(jobs, moments, strict=False):
        end = shared_loop.ends[job.id]
        if isinstance(end, JobCancelled):
            assert leaves is not None
            continue
        assert isinstance(end, JobFinished)
        for index in range(job.image_count):
            wanted = reference.latents(job, index)
            found = shared_loop.latents[job.id, index]
            assert (found - wanted).norm() / wanted.norm() <= 1e-4, job
        if job.exact:
            data = np.frombuffer(shared_loop.image(job.id).image.data, np.uint8)
            assert np.array_equal(data, reference.pixels(job).reshape(-1)), job
