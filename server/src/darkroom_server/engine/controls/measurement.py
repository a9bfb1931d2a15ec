"""Measures what ControlNets take, beside the denoiser."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from darkroom_server.core.errors import StartupError
from darkroom_server.engine.conditioning.input_images import noise_image
from darkroom_server.engine.controls.model_controls import ModelControls, Use
from darkroom_server.engine.controls.sample_control import SampleControl
from darkroom_server.engine.failures import is_out_of_memory, one_line
from darkroom_server.engine.families.base import Family
from darkroom_server.engine.warmup.formats import MemoryFormat
from darkroom_server.engine.warmup.placement import denoiser_timer
from darkroom_server.engine.warmup.presets import Runtime
from darkroom_server.engine.warmup.profiler import seconds_of
from darkroom_server.engine.warmup.row_measurement import MAX_BATCH_SECONDS

READINGS = 5
"""Of a net and of the denoiser, in turns: other programs make some of them longer."""


@dataclass(frozen=True, slots=True)
class NetNeeds:
    """What a ControlNet takes: its share of the denoiser's seconds, and bytes of a row."""

    cost: float
    bytes_per_row: int


def measure_net(
    id: str, controls: ModelControls, family: Family, memory_format: MemoryFormat, runtime: Runtime
) -> NetNeeds:
    """Measure one net at the default size; warms it up too.

    Raises ``StartupError`` if the denoiser does not take its residuals.
    """
    rows = 1 if family.unbatched_reason else 2
    device = runtime.device
    given = family.denoiser_inputs(rows, memory_format.dtype, device, memory_format.layout)
    image = noise_image(family.size, channels=3)
    condition = controls.condition(id, image, rows, torch.Generator("cpu").manual_seed(0))
    control = SampleControl(id=id, condition=condition, scale=1.0, start=0.0, end=1.0)
    use = Use(control, 0, rows, {})
    try:
        residuals = controls.residuals(id, given, [use])
        with controls.precision():
            family.denoiser(**given, **controls.as_arguments([(controls.nets[id], residuals)]))
    except (RuntimeError, ValueError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise StartupError(
            f"ControlNet {id!r} does not fit {family.pipeline_class} ({one_line(error)}); give one "
            "that was trained for this model"
        ) from error
    tensors = [part for parts in residuals.values() for part in parts]
    time_batch = denoiser_timer(family, memory_format, runtime)
    return NetNeeds(
        cost=_cost(
            lambda: seconds_of(device, lambda: controls.residuals(id, given, [use])),
            lambda: time_batch(rows),
        ),
        bytes_per_row=math.ceil(sum(t.numel() * t.element_size() for t in tensors) / rows),
    )


def _cost(net: Callable[[], float], denoiser: Callable[[], float]) -> float:
    """The lowest reading of ``net`` as a part of the lowest of ``denoiser``, at most 1.

    A net is a copy of a part of the denoiser, so more is a reading of a busy machine.
    """
    readings = [(net(), denoiser())]
    while sum(readings[0]) <= MAX_BATCH_SECONDS and len(readings) < READINGS:
        readings.append((net(), denoiser()))
    nets, denoisers = zip(*readings, strict=True)
    return float(min(1.0, min(nets) / min(denoisers)))
