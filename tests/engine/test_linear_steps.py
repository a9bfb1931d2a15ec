"""The steps of every scheduler as coefficients: what merged samples do is what diffusers does."""

from collections.abc import Hashable, Iterator
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from darkroom_server.core.job import SchedulerName
from darkroom_server.engine.components.embedding import Embedding
from darkroom_server.engine.components.scheduler_table import (
    DIFFUSION_SCHEDULERS,
    FLOW_MATCH_SCHEDULERS,
    MAX_STEPS,
)
from darkroom_server.engine.components.schedulers import make_scheduler, offer
from darkroom_server.engine.latent_sample import LatentSample, LinearSample
from darkroom_server.engine.pipelines.hosted_scheduler import hosted_scheduler
from darkroom_server.engine.sample import Sample
from darkroom_server.engine.stepping.linear_run import LinearRun, OutOfOrder
from darkroom_server.engine.stepping.linear_steps import read_steps
from darkroom_server.engine.stepping.merged_step import LinearStep, take_steps
from darkroom_server.engine.stepping.schedules import Schedules
from darkroom_server.engine.stepping.step_tables import StepTables

from .conftest import make_job
from .test_schedulers import BASE

FLOW: dict[str, Any] = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
SHAPE = (4, 8, 8)
SPACINGS = ("leading", "linspace", "trailing")


def new_sample(
    name: SchedulerName,
    steps: int,
    *,
    config: dict[str, Any] = BASE,
    guidance: float = 7.5,
    seed: int = 1,
    merged: bool,
) -> LatentSample:
    """A sample of ``SHAPE`` at its first step; ``merged``: its steps are coefficients."""
    rows = 2 if guidance > 1 else 1
    fields: dict[str, Any] = {
        "embeddings": tuple(Embedding(torch.full((1, 4, 8), i), False) for i in range(rows)),
        "latent_shape": SHAPE,
        "device": torch.device("cpu"),
        "dtype": torch.float32,
    }
    job = make_job(
        f"{name} {seed}", scheduler=name, steps=steps, guidance_scale=guidance, seed=seed
    )
    schedules = Schedules(config)
    if not merged:
        return LatentSample(job, 0, scheduler=schedules.new(name, steps), **fields)
    shared = schedules.shared(name, steps)
    assert shared.linear is not None
    return LinearSample(job, 0, linear=shared.linear, scheduler=shared.scheduler, **fields)


def predict(sample: LatentSample) -> torch.Tensor:
    """A denoiser: its rows depend on the latents, on the timestep and on the row."""
    seen = sample.denoiser_input().expand(sample.rows, *SHAPE)
    shift = torch.arange(sample.rows).view(-1, 1, 1, 1)
    return torch.tanh(seen * 0.3 + 0.1 * shift) + float(sample.timestep) / 5000


def step_together(samples: list[LatentSample]) -> None:
    """One batch: all steps in one call, as the runner takes them."""
    begun = [(sample, sample.begin_step(predict(sample))) for sample in samples]
    merged = [(sample, step) for sample, step in begun if step is not None]
    results = take_steps([step for _, step in merged])
    for (sample, _), result in zip(merged, results, strict=True):
        sample.finish_step(result)


def distance(found: Sample, wanted: Sample) -> float:
    return float((found.latents - wanted.latents).norm() / wanted.latents.norm())


@pytest.fixture(scope="module", autouse=True)
def integrated_once() -> Iterator[None]:
    """LMS integrates with scipy, for milliseconds each step; both ways need the same integrals."""
    integrate = diffusers.LMSDiscreteScheduler.get_lms_coefficient
    known: dict[Hashable, Any] = {}

    def coefficient(self: Any, order: int, t: int, current_order: int) -> Any:
        key = self.sigmas.numpy().tobytes(), order, t, current_order
        if key not in known:
            known[key] = integrate(self, order, t, current_order)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusers.LMSDiscreteScheduler, "get_lms_coefficient", coefficient)
        yield


def with_edges(test: Any) -> Any:
    """``test`` with the fewest and the most steps among its examples."""
    for steps, spacing in zip((1, 2, 149, 150), (*SPACINGS, "leading"), strict=True):
        test = example(steps, spacing, "epsilon", steps % 2 == 0, 3.0)(test)
    return test


@pytest.mark.parametrize("name", DIFFUSION_SCHEDULERS)
@settings(max_examples=2, deadline=None)
@with_edges
@given(
    st.integers(1, MAX_STEPS),
    st.sampled_from(SPACINGS),
    st.sampled_from(["epsilon", "v_prediction"]),
    st.booleans(),
    st.sampled_from([1.0, 3.0, 7.5]),
)
def test_the_whole_way_is_diffusers_own(
    name: SchedulerName,
    steps: int,
    spacing: str,
    prediction: str,
    skips_first: bool,
    guidance: float,
) -> None:
    """With any number of steps that a request may set, and that the scheduler takes."""
    config = {**BASE, "timestep_spacing": spacing, "prediction_type": prediction}
    if name is SchedulerName.PNDM:
        config["skip_prk_steps"] = skips_first
    offered = offer(name, config)
    steps = min(max(steps, offered.min_steps), offered.max_steps)
    wanted, found = (
        new_sample(name, steps, config=config, guidance=guidance, merged=merged)
        for merged in (False, True)
    )
    while not wanted.done:
        wanted.advance(predict(wanted))
        found.advance(predict(found))
        assert distance(found, wanted) <= 1e-5, (found.step, found.steps)
    assert found.done


def mixed_batch(*, merged: bool) -> list[LatentSample]:
    names = [*DIFFUSION_SCHEDULERS, SchedulerName.DDIM, SchedulerName.UNIPC]
    return [
        new_sample(name, 5 + i, guidance=(1.0, 7.5)[i % 3 > 0], seed=i, merged=merged)
        for i, name in enumerate(names)
    ]


def test_all_schedulers_share_batches() -> None:
    wanted, found = mixed_batch(merged=False), mixed_batch(merged=True)
    # Each joins two batches after the one before it.
    for batch in range(60):
        waiting = [s for i, s in enumerate(found) if batch >= 2 * i and not s.done]
        if waiting:
            step_together(waiting)
    assert all(sample.done for sample in found)
    for sample in wanted:
        while not sample.done:
            sample.advance(predict(sample))
    errors = [distance(f, w) for f, w in zip(found, wanted, strict=True)]
    assert max(errors) <= 1e-5, errors
    others = [distance(f, w) for f, w in zip(found, wanted[1:], strict=False)]
    assert min(others) > 1e-3, "the control: another sample's way"


@pytest.mark.parametrize("name", DIFFUSION_SCHEDULERS)
def test_another_steps_coefficients_are_another_way(name: SchedulerName) -> None:
    wanted, found = (new_sample(name, 12, merged=merged) for merged in (False, True))
    assert isinstance(found, LinearSample)
    found._matrices = (*found._matrices[4:], *found._matrices[:4])
    while not wanted.done:
        wanted.advance(predict(wanted))
        found.advance(predict(found))
    assert distance(found, wanted) > 1e-3


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (SchedulerName.DDIM, {"clip_sample": True}),
        (SchedulerName.DDPM, {"clip_sample": True}),
        (SchedulerName.LCM, {"clip_sample": True}),
        (SchedulerName.DDIM, {"thresholding": True}),
        (SchedulerName.DPMPP_2M, {"thresholding": True}),
        (SchedulerName.UNIPC, {"thresholding": True}),
        (SchedulerName.DEIS, {"thresholding": True}),
    ],
)
def test_what_clips_or_thresholds_has_no_coefficients(
    name: SchedulerName, settings: dict[str, Any]
) -> None:
    assert Schedules({**BASE, **settings}).shared(name, 5).linear is None
    assert Schedules(BASE).shared(name, 5).linear is not None, "the control"


def test_a_class_that_is_not_in_the_table_has_no_coefficients() -> None:
    config = {**BASE, "_class_name": "EDMEulerScheduler"}
    assert Schedules(config).shared(SchedulerName.MODEL, 5).linear is None


def flow_match(name: SchedulerName, steps: int) -> Any:
    scheduler = make_scheduler(name, FLOW)
    scheduler.set_timesteps(steps, device="cpu")
    return scheduler


@pytest.mark.parametrize("steps", [1, 7, 40])
@pytest.mark.parametrize("name", FLOW_MATCH_SCHEDULERS)
def test_flow_matching_is_linear_too(name: SchedulerName, steps: int) -> None:
    own = flow_match(name, steps)
    linear = read_steps(own)
    assert linear is not None
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    run = LinearRun(linear, generators[1])
    wanted = found = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(1))
    noise = {"generator": generators[0]}
    for timestep in own.timesteps:
        predictions = [torch.tanh(each) + float(timestep) / 5000 for each in (wanted, found)]
        wanted = own.step(predictions[0], timestep, wanted, **noise, return_dict=False)[0]
        step = run.begin(predictions[1], timestep, found)
        found = run.finish(take_steps([step])[0], found)
        assert (found - wanted).norm() / wanted.norm() <= 1e-5
    assert (predictions[0] - wanted).norm() / wanted.norm() > 1e-3, "the control"


def test_a_run_that_leaves_out_a_step_is_noticed() -> None:
    scheduler = flow_match(SchedulerName.FLOW_MATCH_EULER, 4)
    linear = read_steps(scheduler)
    assert linear is not None
    run, latents = LinearRun(linear, None), torch.ones(1, 4)
    run.finish(take_steps([run.begin(latents, scheduler.timesteps[0], latents)])[0], latents)
    with pytest.raises(OutOfOrder):
        run.begin(latents, scheduler.timesteps[2], latents)
    run.begin(latents, scheduler.timesteps[1], latents)


def test_coefficients_are_read_once_for_all_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = StepTables()
    first = tables.of(flow_match(SchedulerName.FLOW_MATCH_EULER, 6))
    assert tables.of(flow_match(SchedulerName.FLOW_MATCH_EULER, 6)) is first
    assert tables.of(flow_match(SchedulerName.FLOW_MATCH_EULER, 7)) is not first
    assert tables.of(flow_match(SchedulerName.FLOW_MATCH_EULER, 6), first=2) is not first


@pytest.mark.parametrize("name", DIFFUSION_SCHEDULERS)
def test_reading_changes_neither_the_scheduler_nor_the_global_generator(
    name: SchedulerName,
) -> None:
    scheduler = Schedules(BASE).new(name, 6)
    before, state = repr(vars(scheduler)), torch.get_rng_state()
    assert read_steps(scheduler) is not None
    assert repr(vars(scheduler)) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_steps_of_different_shapes_come_back_in_order() -> None:
    steps = [
        LinearStep(torch.tensor([[float(i)]]), (torch.full((1, 2 + i % 3), 2.0),)) for i in range(7)
    ]
    results = take_steps(steps)
    assert [result.shape for result in results] == [(1, 2 + i % 3) for i in range(7)]
    assert [float(result[0, 0]) for result in results] == [2.0 * i for i in range(7)]


def test_few_tensors_are_kept() -> None:
    kept = {
        name: linear.kept
        for name in DIFFUSION_SCHEDULERS
        if (linear := Schedules(BASE).shared(name, 20).linear) is not None
    }
    assert kept[SchedulerName.DDIM] == kept[SchedulerName.EULER] == 0
    assert max(kept.values()) <= 5, kept


def test_previews_have_the_latents_as_the_denoiser_took_them() -> None:
    hosted = hosted_scheduler(Schedules(BASE).new(SchedulerName.EULER, 4))
    hosted.keeps_last_step = True
    latents = torch.full((1, *SHAPE), 5.0)
    for timestep in hosted.timesteps:
        seen = hosted.scale_model_input(latents, timestep)
        latents = hosted.step(seen * 0.1, timestep, latents, return_dict=False)[0]
        assert torch.equal(hosted.last_step.latents, seen)
