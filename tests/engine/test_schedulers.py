"""What is offered works: every scheduler at both ends of the steps that it is offered with."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.job import SchedulerName
from darkroom_server.core.model import SchedulerOffer
from darkroom_server.engine.components.embedding import Embedding
from darkroom_server.engine.components.scheduler_table import DIFFUSION_SCHEDULERS
from darkroom_server.engine.components.schedulers import (
    config_json,
    make_scheduler,
    name_of,
    offer,
    offers,
)
from darkroom_server.engine.latent_sample import LatentSample
from darkroom_server.engine.stepping.schedules import Schedules

from .conftest import make_job

SD_SCHEDULERS = [*DIFFUSION_SCHEDULERS, SchedulerName.MODEL]
"""What models for diffusion offer."""

BASE: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def run_to_end(name: SchedulerName, steps: int, config: dict[str, Any]) -> LatentSample:
    """A sample taken to its end with a denoiser that predicts a tenth of what it sees."""
    sample = LatentSample(
        make_job("alone", scheduler=name, steps=steps, guidance_scale=1.0),
        0,
        scheduler=Schedules(config).new(name, steps),
        embeddings=(Embedding(torch.zeros(1, 4, 8), truncated=False),),
        latent_shape=(4, 8, 8),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    while not sample.done:
        sample.advance(sample.denoiser_input() * 0.1)
    return sample


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", SD_SCHEDULERS)
def test_both_ends_of_the_offer(name: SchedulerName, spacing: str, prediction: str) -> None:
    config = {**BASE, "timestep_spacing": spacing, "prediction_type": prediction}
    offered = offer(name, config)
    for steps in {offered.min_steps, offered.min_steps + 1, offered.max_steps}:
        sample = run_to_end(name, steps, config)
        assert torch.isfinite(sample.latents).all(), (steps, sample.latents)


@pytest.mark.parametrize(
    ("name", "steps", "calls"),
    [
        (SchedulerName.DDIM, 20, 20),
        (SchedulerName.PNDM, 50, 51),
        (SchedulerName.HEUN, 50, 99),
        (SchedulerName.LCM, 4, 4),
    ],
)
def test_steps_are_counted_by_denoiser_calls(name: SchedulerName, steps: int, calls: int) -> None:
    assert run_to_end(name, steps, {**BASE, "skip_prk_steps": True}).steps == calls


def miscounted(
    table: Callable[[int], int], name: SchedulerName, steps: Iterable[int], config: dict[str, Any]
) -> list[int]:
    """The step counts for which ``table`` differs from the calls that diffusers makes."""
    scheduler = make_scheduler(name, config)
    wrong = []
    for each in steps:
        scheduler.set_timesteps(each, device="cpu")
        if table(each) != len(scheduler.timesteps):
            wrong.append(each)
    return wrong


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize(
    ("name", "skip_prk_steps"),
    [*((name, True) for name in SD_SCHEDULERS), (SchedulerName.PNDM, False)],
)
def test_the_table_counts_the_denoiser_calls(
    name: SchedulerName, spacing: str, skip_prk_steps: bool
) -> None:
    config = {**BASE, "timestep_spacing": spacing, "skip_prk_steps": skip_prk_steps}
    offered = offer(name, config)
    steps = set(range(offered.min_steps, offered.max_steps + 1))
    if spacing == "trailing":
        # diffusers rounds here, and makes one timestep more.
        steps -= {61, 103, 121, 122}
    if name is SchedulerName.PNDM and skip_prk_steps:
        assert miscounted(offered.denoiser_calls, name, {1}, config) == [1], "1 call, not 2"
        steps -= {1}
    assert len(steps) >= 45
    assert miscounted(offered.denoiser_calls, name, steps, config) == []


@pytest.mark.parametrize("name", [SchedulerName.HEUN, SchedulerName.PNDM])
def test_a_table_without_their_calls_is_wrong_for_all_steps(name: SchedulerName) -> None:
    steps = range(4, 151)
    plain = SchedulerOffer(name=name, min_steps=1, max_steps=150)
    assert miscounted(plain.denoiser_calls, name, steps, BASE) == list(steps)


def test_the_fake_model_counts_by_the_same_table() -> None:
    (fake,) = (o for o in fake_model().schedulers if o.name is SchedulerName.PNDM)
    real = offer(SchedulerName.PNDM, {**BASE, "skip_prk_steps": True})
    assert fake.denoiser_calls(20) == real.denoiser_calls(20) == 21


def test_lcm_takes_as_many_steps_as_the_model_was_distilled_on() -> None:
    assert offer(SchedulerName.LCM, BASE).max_steps == 50


def test_pndm_needs_four_steps_for_its_warm_up() -> None:
    assert offer(SchedulerName.PNDM, BASE).min_steps == 4
    assert offer(SchedulerName.PNDM, {**BASE, "skip_prk_steps": True}).min_steps == 1


@pytest.mark.parametrize("name", DIFFUSION_SCHEDULERS)
def test_a_model_that_brings_a_scheduler_offers_it_by_name(name: SchedulerName) -> None:
    assert name_of(make_scheduler(name, BASE)) is name


def test_the_models_own_scheduler_keeps_its_settings() -> None:
    config = {**BASE, "_class_name": "HeunDiscreteScheduler", "use_karras_sigmas": True}
    own = make_scheduler(SchedulerName.MODEL, config)
    assert type(own).__name__ == "HeunDiscreteScheduler"
    assert own.config.use_karras_sigmas
    assert offer(SchedulerName.MODEL, config).denoiser_calls(10) == 19


def test_every_scheduler_is_offered_once() -> None:
    assert [o.name for o in offers(BASE)] == SD_SCHEDULERS


def test_the_configuration_of_the_model_is_kept() -> None:
    scheduler = make_scheduler(SchedulerName.EULER, {**BASE, "timestep_spacing": "trailing"})
    assert '"timestep_spacing": "trailing"' in config_json(scheduler)
    assert '"beta_end": 0.012' in config_json(scheduler)
