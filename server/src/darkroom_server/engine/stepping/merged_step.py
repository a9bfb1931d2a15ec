"""One step of many samples: a single product for all that have the same shape."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from darkroom_server.engine.device.transfer import send


@dataclass(frozen=True, slots=True)
class LinearStep:
    """A step that one sample has to take: ``matrix`` @ ``inputs``, one below the other.

    ``matrix`` is [outputs, sum of the inputs' rows] on the CPU, each input [rows, numbers of an
    image] of any dtype. The first is on the sample's device, the others may be on the CPU.
    """

    matrix: torch.Tensor
    inputs: tuple[torch.Tensor, ...]


def take_steps(steps: Sequence[LinearStep]) -> list[torch.Tensor]:
    """What each of ``steps`` results in, [outputs, numbers of an image] in float32.

    The results of one call share memory.
    """
    groups: dict[tuple[torch.Size, ...], list[int]] = {}
    for place, step in enumerate(steps):
        shapes = (step.matrix.shape, *(each.shape for each in step.inputs))
        groups.setdefault(shapes, []).append(place)
    if len(groups) == 1:
        return _take_alike(steps)
    results: dict[int, torch.Tensor] = {}
    for places in groups.values():
        results.update(zip(places, _take_alike([steps[i] for i in places]), strict=True))
    return [results[place] for place in range(len(steps))]


def _take_alike(steps: Sequence[LinearStep]) -> list[torch.Tensor]:
    """As ``take_steps``, for steps of equal shapes."""
    device = steps[0].inputs[0].device
    numbers = steps[0].inputs[0].shape[1]
    stacked = [
        send(torch.cat(parts), device).float().view(len(steps), -1, numbers)
        for parts in zip(*(step.inputs for step in steps), strict=True)
    ]
    matrices = send(torch.stack([step.matrix for step in steps]), device)
    return list(torch.bmm(matrices, torch.cat(stacked, dim=1)).unbind())
