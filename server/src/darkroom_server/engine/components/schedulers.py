"""The noise schedulers: makes diffusers' objects from the table, and says what a model offers."""

import json
from dataclasses import replace
from typing import Any

import diffusers

from darkroom_server.core.job import SchedulerName
from darkroom_server.core.model import SchedulerOffer
from darkroom_server.engine.components.scheduler_table import SCHEDULERS

PRK_EXTRA_CALLS = 9
"""PNDM's Runge-Kutta warm-up takes 12 calls in place of its first 3 steps."""


def make_scheduler(name: SchedulerName, config: dict[str, Any]) -> Any:
    """A new diffusers scheduler: ``name``'s class on the model's scheduler ``config``."""
    spec = SCHEDULERS[name]
    return getattr(diffusers, spec.class_name).from_config(config, **spec.overrides)


def offer(name: SchedulerName, config: dict[str, Any]) -> SchedulerOffer:
    """The steps that ``name`` takes on the model's scheduler ``config``, and their calls."""
    spec = SCHEDULERS[name]
    scheduler = make_scheduler(name, config)
    if name is SchedulerName.LCM:
        # LCM picks its timesteps from those that the model was distilled on.
        return spec.offer(max_steps=int(scheduler.config.original_inference_steps))
    if name is SchedulerName.PNDM and not scheduler.config.skip_prk_steps:
        # The Runge-Kutta warm-up looks four timesteps back.
        return replace(spec.offer(min_steps=4), extra_calls=PRK_EXTRA_CALLS)
    return spec.offer()


def offers(config: dict[str, Any]) -> tuple[SchedulerOffer, ...]:
    """Every scheduler's offer, for the model's scheduler ``config``."""
    return tuple(offer(name, config) for name in SCHEDULERS)


def name_of(scheduler: Any) -> SchedulerName | None:
    """The name under which ``scheduler``'s class and algorithm are offered, or None."""
    config = scheduler.config
    for name, spec in SCHEDULERS.items():
        if spec.class_name == type(scheduler).__name__ and all(
            config.get(key) == value for key, value in spec.overrides.items()
        ):
            return name
    return None


def config_json(scheduler: Any) -> str:
    """``scheduler``'s configuration as JSON, without the private entries of diffusers."""
    config = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    return json.dumps(config, sort_keys=True, default=str)
