"""The noise schedulers on offer: which of diffusers' classes stands behind each name, and how."""

import json
from dataclasses import dataclass, field
from typing import Any

import diffusers

from darkroom_server.core.job import SchedulerName
from darkroom_server.core.model import SchedulerOffer

MAX_STEPS = 150


@dataclass(frozen=True, slots=True)
class SchedulerSpec:
    """A class of diffusers, and what it is told besides the model's own configuration."""

    class_name: str
    overrides: dict[str, Any] = field(default_factory=dict)


def _dpm(algorithm: str, karras: bool) -> SchedulerSpec:
    return SchedulerSpec(
        "DPMSolverMultistepScheduler",
        {"algorithm_type": algorithm, "use_karras_sigmas": karras, "solver_order": 2},
    )


RECIPES: dict[SchedulerName, SchedulerSpec] = {
    SchedulerName.DDIM: SchedulerSpec("DDIMScheduler"),
    SchedulerName.DDPM: SchedulerSpec("DDPMScheduler"),
    SchedulerName.PNDM: SchedulerSpec("PNDMScheduler"),
    SchedulerName.LMS: SchedulerSpec("LMSDiscreteScheduler"),
    SchedulerName.EULER: SchedulerSpec("EulerDiscreteScheduler"),
    SchedulerName.EULER_ANCESTRAL: SchedulerSpec("EulerAncestralDiscreteScheduler"),
    SchedulerName.HEUN: SchedulerSpec("HeunDiscreteScheduler"),
    SchedulerName.DPMPP_2M: _dpm("dpmsolver++", karras=False),
    SchedulerName.DPMPP_2M_KARRAS: _dpm("dpmsolver++", karras=True),
    SchedulerName.DPMPP_2M_SDE: _dpm("sde-dpmsolver++", karras=False),
    SchedulerName.DPMPP_2M_SDE_KARRAS: _dpm("sde-dpmsolver++", karras=True),
    SchedulerName.UNIPC: SchedulerSpec("UniPCMultistepScheduler"),
    SchedulerName.DEIS: SchedulerSpec(
        "DEISMultistepScheduler", {"algorithm_type": "deis", "solver_type": "logrho"}
    ),
    SchedulerName.LCM: SchedulerSpec("LCMScheduler"),
}


def make_scheduler(name: SchedulerName, config: dict[str, Any]) -> Any:
    """A fresh diffusers scheduler object: ``name``'s class on the model's scheduler ``config``."""
    recipe = RECIPES[name]
    return getattr(diffusers, recipe.class_name).from_config(config, **recipe.overrides)


def offer(name: SchedulerName, config: dict[str, Any]) -> SchedulerOffer:
    """What steps ``name`` takes on the model's scheduler ``config``."""
    scheduler = make_scheduler(name, config)
    if name is SchedulerName.LCM:
        # LCM picks its timesteps from those that the model was distilled on.
        most = int(scheduler.config.original_inference_steps)
        return SchedulerOffer(name=name, min_steps=1, max_steps=most)
    if name is SchedulerName.PNDM and not scheduler.config.skip_prk_steps:
        # The Runge-Kutta warm-up looks four timesteps back.
        return SchedulerOffer(name=name, min_steps=4, max_steps=MAX_STEPS)
    return SchedulerOffer(name=name, min_steps=1, max_steps=MAX_STEPS)


def offers(config: dict[str, Any]) -> tuple[SchedulerOffer, ...]:
    """Every scheduler on offer, for the model's scheduler ``config``."""
    return tuple(offer(name, config) for name in RECIPES)


def name_of(scheduler: Any) -> SchedulerName | None:
    """The name under which ``scheduler``'s class and algorithm are offered, or None."""
    config = scheduler.config
    for name, recipe in RECIPES.items():
        if recipe.class_name == type(scheduler).__name__ and all(
            config.get(key) == value for key, value in recipe.overrides.items()
        ):
            return name
    return None


def config_json(scheduler: Any) -> str:
    """``scheduler``'s configuration as JSON, without what diffusers notes for itself."""
    config = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    return json.dumps(config, sort_keys=True, default=str)
