"""FLUX.1 and Z-Image with random joins, cancels, deadlines and failures: the rest is right."""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from bench.tiny_families import flux, z_image
from bench.tiny_families.case import FamilyCase
from darkroom_server.core.events import (
    BatchDone,
    JobCancelled,
    JobFailed,
    JobFinished,
    SampleProgress,
)
from darkroom_server.core.job import Job, SchedulerName
from darkroom_server.engine.pipelines import arguments
from darkroom_server.engine.pipelines.model import SuspendedModel
from darkroom_server.engine.pipelines.sample import SuspendedSample

from .conftest import End, make_job
from .test_family_parity import NOTICEABLE, Served

names = itertools.count()

PROMPTS = st.sampled_from(["a red ring", "a small heart", z_image.LONG])
SEEDS = st.integers(0, 2**63 - 1)

FLUX_FIELDS = st.fixed_dictionaries(
    {
        "prompt": PROMPTS,
        "seed": SEEDS,
        "steps": st.integers(1, 6),
        "image_count": st.integers(1, 2),
        "guidance_scale": st.sampled_from([1.0, 3.5, 7.0]),
        "true_cfg_scale": st.sampled_from([1.0, 1.0, 3.0]),
        "negative_prompt": st.sampled_from(["", "blue"]),
        "max_sequence_length": st.sampled_from([32, 32, 48]),
        "width": st.sampled_from([64, 64, 96]),
        "exact": st.sampled_from([False, False, True]),
    }
)
Z_IMAGE_FIELDS = st.fixed_dictionaries(
    {
        "prompt": PROMPTS,
        "seed": SEEDS,
        "steps": st.integers(1, 6),
        "image_count": st.integers(1, 2),
        "guidance_scale": st.sampled_from([0.0, 0.5, 4.0]),
        "negative_prompt": st.sampled_from(["", "blue"]),
        "width": st.sampled_from([96, 112, 128]),
        "height": st.sampled_from([96, 128]),
        "exact": st.sampled_from([False, False, True]),
    }
)


@dataclass(frozen=True, slots=True)
class Fate:
    """What ends a job early: ``cancel`` or ``expire``, ``step`` steps of any job after it joins.

    Or the batch or the pipeline ``fail`` at its own ``step``.
    """

    what: str
    step: int


FATES = st.none() | st.builds(
    Fate,
    st.sampled_from(["cancel", "expire", "fail the batch", "fail the pipeline"]),
    st.integers(0, 5),
)
JOINS = st.integers(0, 10)


class Fates:
    """Makes jobs fail in the engine; by job id."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.by_job: dict[str, Fate] = {}
        denoise, begin = SuspendedModel.denoise, SuspendedSample.begin_step

        def failing_batch(model: SuspendedModel, samples: Any) -> list[Any]:
            if any(self._is_due(sample, "fail the batch") for sample in samples):
                raise ValueError("this batch fails")
            return denoise(model, samples)

        def failing_pipeline(sample: SuspendedSample, prediction: Any) -> Any:
            if self._is_due(sample, "fail the pipeline"):
                raise ValueError("this pipeline fails")
            return begin(sample, prediction)

        monkeypatch.setattr(SuspendedModel, "denoise", failing_batch)
        monkeypatch.setattr(SuspendedSample, "begin_step", failing_pipeline)

    def _is_due(self, sample: SuspendedSample, what: str) -> bool:
        fate = self.by_job.get(sample.job.id)
        return fate is not None and fate.what == what and sample.step >= fate.step


@pytest.fixture(autouse=True, scope="module")
def no_tracebacks() -> Iterator[None]:
    """Log nothing: to format the tracebacks of the failures takes longer than all the rest."""
    with capture_logs():
        yield


@pytest.fixture(scope="module")
def fates() -> Iterator[Fates]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Fates(monkeypatch)


def serve(case: FamilyCase, folder: Any) -> Iterator[Served]:
    torch.set_num_threads(1)
    made = Served(case, case.write(folder))
    yield made
    batches = [event for event in made.loop.events if isinstance(event, BatchDone)]
    made.loop.close()
    assert max(batch.samples for batch in batches) >= 3, "samples shared batches"


@pytest.fixture(scope="module")
def flux_dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serve(flux.CASES[0], tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def z_image_base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serve(z_image.CASES[0], tmp_path_factory.mktemp("z-image"))


def new_job(served: Served, name: str, **fields: Any) -> Job:
    defaults = served.loop.models["tiny"].info.defaults
    usual = {
        "width": defaults.width,
        "height": defaults.height,
        "max_sequence_length": defaults.max_sequence_length,
        "scheduler": SchedulerName.MODEL,
    }
    return make_job(f"{name}-{next(names)}", **{**usual, **fields})


def run_schedule(
    served: Served, fates: Fates, plan: list[tuple[dict[str, Any], int, Fate | None]]
) -> dict[str, Job]:
    """Run the jobs of ``plan``; each joins after some steps of any job."""
    loop = served.loop
    jobs: dict[str, Job] = {}
    timeline: list[tuple[int, int, str, Job]] = []
    for fields, joins, fate in plan:
        job = new_job(served, "random", **fields)
        jobs[job.id] = job
        timeline.append((joins, 0, "submit", job))
        if fate is not None:
            fates.by_job[job.id] = fate
            timeline.append((joins + fate.step, 1, fate.what, job))
    timeline.sort(key=lambda entry: entry[:2])
    steps = 0

    def act(event: object) -> None:
        nonlocal steps
        if not isinstance(event, SampleProgress):
            return
        steps += 1
        while timeline and timeline[0][0] <= steps:
            _, _, what, job = timeline.pop(0)
            match what:
                case "submit":
                    loop.loop.submit(job)
                case "cancel":
                    loop.loop.cancel(job.id)
                case "expire":
                    loop.loop.extend(job.id, time.monotonic() - 1.0)

    loop.on_event = act
    try:
        # As many steps of its own as the last entry of any timeline is after.
        ends = loop.run(new_job(served, "starter", steps=16, guidance_scale=1.0))
        assert all(isinstance(end, JobFinished) for end in ends.values())
    finally:
        loop.on_event = lambda _: None
    assert not timeline
    loop.wait_for(lambda: jobs.keys() <= loop.ends.keys())
    return jobs


def check_end(fate: Fate | None, end: End) -> None:
    """A job ends early only by its own fate."""
    match end:
        case JobCancelled(expired=expired):
            assert fate is not None
            assert fate.what == ("expire" if expired else "cancel")
        case JobFailed():
            assert fate is not None
            assert fate.what.startswith("fail")
        case JobFinished():
            fails = fate is not None and fate.what.startswith("fail")
            assert not fails, "its steps go beyond the failure"


def check_images(served: Served, jobs: list[Job]) -> None:
    """The images of ``jobs`` are those of the family's own pipeline, run alone."""
    for job in jobs:
        for index in range(job.image_count):
            alone = replace(job, seed=job.seed_of(index))
            wanted, pixels = served.alone.image(alone)
            found = served.loop.latents[job.id, index]
            assert off(found, wanted) <= served.case.tolerance, job
            if job.exact:
                data = np.frombuffer(served.loop.image(job.id, index).image.data, np.uint8)
                assert np.array_equal(data, pixels.reshape(-1)), job
    if jobs:
        last = jobs[-1]
        other, _ = served.alone.image(replace(last, seed=(last.seed + 5) % 2**63))
        found = served.loop.latents[last.id, 0]
        assert off(found, other) > NOTICEABLE, "another image would be noticed"


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def check_schedule(
    served: Served, fates: Fates, plan: list[tuple[dict[str, Any], int, Fate | None]]
) -> None:
    # A failure after the last step would not happen.
    plan = [
        (fields, joins, fate and replace(fate, step=min(fate.step, fields["steps"] - 1)))
        for fields, joins, fate in plan
    ]
    jobs = run_schedule(served, fates, plan)
    ends = served.loop.ends
    for id in jobs:
        check_end(fates.by_job.get(id), ends[id])
    check_images(served, [job for id, job in jobs.items() if isinstance(ends[id], JobFinished)])
    assert served.loop.loop._residency.held_bytes == 0


EXAMPLES = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))


@EXAMPLES
@given(plan=st.lists(st.tuples(FLUX_FIELDS, JOINS, FATES), min_size=3, max_size=5))
def test_any_schedule_of_flux(flux_dev: Served, fates: Fates, plan: Any) -> None:
    check_schedule(flux_dev, fates, plan)


@EXAMPLES
@given(plan=st.lists(st.tuples(Z_IMAGE_FIELDS, JOINS, FATES), min_size=3, max_size=5))
def test_any_schedule_of_z_image(z_image_base: Served, fates: Fates, plan: Any) -> None:
    check_schedule(z_image_base, fates, plan)


def test_positions_are_read_once_for_each_image(
    flux_dev: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, read = arguments._compute_digest, []

    def count(value: torch.Tensor) -> bytes:
        read.append(value.shape)
        return compute(value)

    monkeypatch.setattr(arguments, "_compute_digest", count)
    flux_dev.loop.run(new_job(flux_dev, "ten", steps=10, prompt="never seen before"))
    assert len(read) == 2, "those of the image and those of the prompt"


def test_positions_that_a_pipeline_writes_into_are_not_merged(
    flux_dev: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = SuspendedSample.finish_step

    def write(sample: SuspendedSample, result: torch.Tensor) -> None:
        finish(sample, result)
        if sample.job.id.startswith("shifted") and not sample.done and sample.step == 2:
            cast(Any, sample.pending).arguments["img_ids"][:, 1] += 1

    monkeypatch.setattr(SuspendedSample, "finish_step", write)
    jobs = [new_job(flux_dev, name, steps=6) for name in ("plain", "shifted", "plain")]
    flux_dev.loop.run(*jobs)
    steps = flux_dev.loop.progress(jobs[0].id)
    assert [step.rows for step in steps] == [3, 3, 3, 2, 2, 2]
    check_images(flux_dev, [jobs[0], jobs[2]])
    monkeypatch.undo()
    unshifted, _ = flux_dev.alone.image(jobs[1])
    assert off(flux_dev.loop.latents[jobs[1].id, 0], unshifted) > NOTICEABLE, "it was written"
