"""The noise schedulers: makes diffusers' objects from the table, and says what a model offers."""

import copy
import functools
import json
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers

from darkroom_server.core.job import SchedulerName
from darkroom_server.core.model import SchedulerOffer
from darkroom_server.engine.components.scheduler_table import (
    DIFFUSION_SCHEDULERS,
    SCHEDULERS,
    SchedulerSpec,
)

PRK_EXTRA_CALLS = 9
"""PNDM's Runge-Kutta warm-up takes 12 calls in place of its first 3 steps."""

CLASS = "_class_name"
"""The entry of a scheduler's configuration that names its class."""


TEMPLATES = 256
"""Schedulers to copy that are kept: fifteen for each configuration, of a few kilobytes."""


def config_of(scheduler: Any) -> dict[str, Any]:
    """The configuration of a model's own ``scheduler``, with its class."""
    return {**scheduler.config, CLASS: type(scheduler).__name__}


def make_scheduler(name: SchedulerName, config: dict[str, Any]) -> Any:
    """A new diffusers scheduler: ``name``'s class on the model's scheduler ``config``."""
    text = json.dumps(config, sort_keys=True, default=repr)
    return copy.deepcopy(_template(name, _Config(text, config)))


@dataclass(frozen=True, slots=True)
class _Config:
    """A scheduler's configuration, which is compared by its ``text``."""

    text: str
    fields: dict[str, Any] = field(compare=False)


@functools.lru_cache(maxsize=TEMPLATES)
def _template(name: SchedulerName, configuration: _Config) -> Any:
    """A scheduler that is never used itself: diffusers takes longer to make one than to copy it."""
    config = configuration.fields
    spec = _spec(name, config)
    overrides = dict(spec.overrides)
    if spec.flow_match and "flow_shift" in config and "shift" not in config:
        # Schedulers that are not for flow matching alone have another name for it.
        overrides["shift"] = config["flow_shift"]
    return getattr(diffusers, spec.class_name).from_config(config, **overrides)


def offer(name: SchedulerName, config: dict[str, Any]) -> SchedulerOffer:
    """The steps that ``name`` takes on the model's scheduler ``config``, and their calls."""
    spec = _spec(name, config)
    scheduler = make_scheduler(name, config)
    if spec.class_name == "LCMScheduler":
        # LCM picks its timesteps from those that the model was distilled on.
        return spec.offer(max_steps=int(scheduler.config.original_inference_steps))
    if spec.class_name == "PNDMScheduler" and not scheduler.config.skip_prk_steps:
        # The Runge-Kutta warm-up looks four timesteps back.
        return replace(spec.offer(min_steps=4), extra_calls=PRK_EXTRA_CALLS)
    return spec.offer()


def offers(config: dict[str, Any]) -> tuple[SchedulerOffer, ...]:
    """The offer of every scheduler for diffusion, for the model's scheduler ``config``."""
    return tuple(offer(name, config) for name in (*DIFFUSION_SCHEDULERS, SchedulerName.MODEL))


def name_of(scheduler: Any) -> SchedulerName:
    """The name under which ``scheduler``'s class and algorithm are offered."""
    config = scheduler.config
    for name, spec in SCHEDULERS.items():
        if spec.class_name == type(scheduler).__name__ and all(
            config.get(key) == value for key, value in spec.overrides.items()
        ):
            return name
    return SchedulerName.MODEL


def config_json(scheduler: Any) -> str:
    """``scheduler``'s configuration as JSON, without the private entries of diffusers."""
    config = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    return json.dumps(config, sort_keys=True, default=str)


def _spec(name: SchedulerName, config: dict[str, Any]) -> SchedulerSpec:
    """The table's entry of ``name``; for the model's own, what the table says of its class."""
    if name is not SchedulerName.MODEL:
        return SCHEDULERS[name]
    own = str(config[CLASS])
    alike = next((spec for spec in SCHEDULERS.values() if spec.class_name == own), None)
    if alike is None:
        return SchedulerSpec(name=name, class_name=own)
    return replace(alike, name=name, overrides={})
