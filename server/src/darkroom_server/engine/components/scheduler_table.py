"""The table of noise schedulers: diffusers' class behind each name, and what its steps cost.

Plain data without torch, so that the fake model reads it too.
"""

from dataclasses import dataclass, field
from typing import Any

from darkroom_server.core.job import SchedulerName
from darkroom_server.core.model import SchedulerOffer

MAX_STEPS = 150


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSpec:
    """A scheduler class of diffusers, and the settings that override the model's configuration.

    A run of N steps makes ``calls_per_step`` × N + ``extra_calls`` denoiser calls. ``flow_match``:
    for models trained by flow matching; the others are for diffusion.
    """

    name: SchedulerName
    class_name: str
    overrides: dict[str, Any] = field(default_factory=dict)
    calls_per_step: int = 1
    extra_calls: int = 0
    flow_match: bool = False

    def offer(self, *, min_steps: int = 1, max_steps: int = MAX_STEPS) -> SchedulerOffer:
        """What a model offers that takes ``min_steps`` to ``max_steps`` steps of this scheduler."""
        return SchedulerOffer(
            name=self.name,
            min_steps=min_steps,
            max_steps=max_steps,
            calls_per_step=self.calls_per_step,
            extra_calls=self.extra_calls,
        )


def _dpm(name: SchedulerName, algorithm: str, karras: bool) -> SchedulerSpec:
    return SchedulerSpec(
        name=name,
        class_name="DPMSolverMultistepScheduler",
        overrides={"algorithm_type": algorithm, "use_karras_sigmas": karras, "solver_order": 2},
    )


SCHEDULERS: dict[SchedulerName, SchedulerSpec] = {
    spec.name: spec
    for spec in (
        SchedulerSpec(name=SchedulerName.DDIM, class_name="DDIMScheduler"),
        SchedulerSpec(name=SchedulerName.DDPM, class_name="DDPMScheduler"),
        # Repeats its second timestep.
        SchedulerSpec(name=SchedulerName.PNDM, class_name="PNDMScheduler", extra_calls=1),
        SchedulerSpec(name=SchedulerName.LMS, class_name="LMSDiscreteScheduler"),
        SchedulerSpec(name=SchedulerName.EULER, class_name="EulerDiscreteScheduler"),
        SchedulerSpec(
            name=SchedulerName.EULER_ANCESTRAL, class_name="EulerAncestralDiscreteScheduler"
        ),
        # Of second order: predicts, then corrects, in all steps but the last.
        SchedulerSpec(
            name=SchedulerName.HEUN,
            class_name="HeunDiscreteScheduler",
            calls_per_step=2,
            extra_calls=-1,
        ),
        _dpm(SchedulerName.DPMPP_2M, "dpmsolver++", karras=False),
        _dpm(SchedulerName.DPMPP_2M_KARRAS, "dpmsolver++", karras=True),
        _dpm(SchedulerName.DPMPP_2M_SDE, "sde-dpmsolver++", karras=False),
        _dpm(SchedulerName.DPMPP_2M_SDE_KARRAS, "sde-dpmsolver++", karras=True),
        SchedulerSpec(name=SchedulerName.UNIPC, class_name="UniPCMultistepScheduler"),
        SchedulerSpec(
            name=SchedulerName.DEIS,
            class_name="DEISMultistepScheduler",
            overrides={"algorithm_type": "deis", "solver_type": "logrho"},
        ),
        SchedulerSpec(name=SchedulerName.LCM, class_name="LCMScheduler"),
        SchedulerSpec(
            name=SchedulerName.FLOW_MATCH_EULER,
            class_name="FlowMatchEulerDiscreteScheduler",
            flow_match=True,
        ),
        SchedulerSpec(
            name=SchedulerName.FLOW_MATCH_HEUN,
            class_name="FlowMatchHeunDiscreteScheduler",
            calls_per_step=2,
            extra_calls=-1,
            flow_match=True,
        ),
        SchedulerSpec(
            name=SchedulerName.FLOW_MATCH_LCM,
            class_name="FlowMatchLCMScheduler",
            flow_match=True,
        ),
    )
}
"""By name; without ``SchedulerName.MODEL``, whose class the model's folder names."""

DIFFUSION_SCHEDULERS = tuple(name for name, spec in SCHEDULERS.items() if not spec.flow_match)
FLOW_MATCH_SCHEDULERS = tuple(name for name, spec in SCHEDULERS.items() if spec.flow_match)
