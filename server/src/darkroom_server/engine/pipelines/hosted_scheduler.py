"""A noise scheduler for a suspended run: its steps are merged with those of other runs."""

import copy
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from darkroom_server.engine.pipelines.calls import StepCall
from darkroom_server.engine.pipelines.coroutine import is_suspendable, suspend
from darkroom_server.engine.stepping.linear_run import LinearRun
from darkroom_server.engine.stepping.step_tables import StepTables


@dataclass(slots=True)
class LastStep:
    """What a scheduler was given in its last step; ``latents`` as the denoiser took them."""

    prediction: torch.Tensor
    timestep: Any
    latents: torch.Tensor


def hosted_scheduler(scheduler: Any, *, timesteps_on_cpu: bool = True) -> Any:
    """``scheduler`` with its timesteps on the CPU, where reading them does not wait for a GPU.

    With ``timesteps_on_cpu`` false they are where the pipeline asks for them. If
    ``keeps_last_step`` is set on it, each step replaces ``last_step``. It is data and no callback,
    because nothing that a run reaches may lead to the run's sample. If ``merges`` is set on it
    before its first step, and its steps are linear, each of them suspends the run.
    """
    hosted = copy.copy(scheduler)
    hosted.__class__ = _hosted_scheduler_class(scheduler.__class__, timesteps_on_cpu)
    hosted.keeps_last_step = False
    hosted.last_step = None
    hosted.merges = False
    hosted.linear_run = None
    hosted.tables = StepTables()
    return hosted


@functools.cache
def _hosted_scheduler_class(base: Any, timesteps_on_cpu: bool) -> type:
    set_timesteps, step = base.set_timesteps, base.step

    # The wrappers keep the signatures: pipelines read them to see what a scheduler takes.
    @functools.wraps(set_timesteps)
    def set_timesteps_on_cpu(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(set_timesteps).bind(self, *args, **kwargs)
        if "device" in bound.arguments:
            bound.arguments["device"] = "cpu"
        return set_timesteps(*bound.args, **bound.kwargs)

    @functools.wraps(step)
    def kept_step(
        self: Any, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if self.keeps_last_step:
            self.last_step = LastStep(model_output, timestep, _scaled(self, sample, timestep))
        if self.merges:
            self.merges = False
            self.linear_run = _linear_run(self, model_output, timestep, sample, args, kwargs)
        run = self.linear_run
        if run is None:
            return step(self, model_output, timestep, sample, *args, **kwargs)
        merged = StepCall(run.begin(model_output, timestep, sample))
        latents = run.finish(suspend(merged, sample.device.type), sample)
        _count_step(self, timestep)
        return (latents,)

    members = {"step": kept_step}
    if timesteps_on_cpu:
        members["set_timesteps"] = set_timesteps_on_cpu
    if hasattr(base, "scale_model_input"):
        members["scale_model_input"] = _scale_model_input(base.scale_model_input)
    return type(base.__name__, (base,), members)


def _scale_model_input(scale: Any) -> Any:
    @functools.wraps(scale)
    def scale_model_input(self: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        if self.linear_run is None:
            return scale(self, sample, *args, **kwargs)
        return self.linear_run.scaled(sample)

    return scale_model_input


def _scaled(scheduler: Any, latents: Any, timestep: Any) -> Any:
    """``latents`` as the denoiser takes them at the scheduler's next step."""
    if not hasattr(scheduler, "scale_model_input"):
        return latents
    return scheduler.scale_model_input(latents, timestep)


def _linear_run(
    scheduler: Any,
    prediction: Any,
    timestep: Any,
    latents: Any,
    args: tuple[Any, ...],
    options: Mapping[str, Any],
) -> LinearRun | None:
    """The run whose first step has these arguments, None if it needs diffusers' own steps."""
    generator = options.get("generator")
    plain = not args and not options.get("eta") and options.get("return_dict") is False
    known = options.keys() <= {"generator", "eta", "return_dict"}
    alike = prediction.shape == latents.shape and prediction.dtype == latents.dtype
    first = _place_of(scheduler, timestep)
    if not (plain and known and alike and is_suspendable()) or first is None:
        return None
    steps = scheduler.tables.of(scheduler, first)
    if steps is None or (steps.takes_noise and not isinstance(generator, torch.Generator)):
        return None
    return LinearRun(steps, generator)


def _place_of(scheduler: Any, timestep: Any) -> int | None:
    """The place of the run's first timestep, None if it is not certain.

    A run that starts from an image leaves out the first timesteps, and some occur twice.
    """
    timesteps = scheduler.timesteps.tolist()
    first = float(timestep)
    begin = getattr(scheduler, "begin_index", None)
    if begin is None:
        begin = 0 if timesteps[0] == first else None
    if begin is None and timesteps.count(first) == 1:
        begin = timesteps.index(first)
    return begin if begin is not None and timesteps[begin] == first else None


def _count_step(scheduler: Any, timestep: Any) -> None:
    """Count a step as diffusers' own does: what else it computes depends on the count."""
    if not hasattr(scheduler, "_step_index"):
        return
    if scheduler.step_index is None:
        scheduler._init_step_index(timestep)
    scheduler._step_index += 1
