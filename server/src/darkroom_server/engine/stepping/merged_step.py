"""One step of many samples: a single product for all that have the same shape."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from darkroom_server.engine.device.transfer import send_together


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

    What is on the CPU goes to the device in one copy. The results of equal shapes share memory.
    """
    groups: dict[tuple[torch.Size, ...], list[int]] = {}
    for place, step in enumerate(steps):
        shapes = (step.matrix.shape, *(each.shape for each in step.inputs))
        groups.setdefault(shapes, []).append(place)
    stacked = [_stack([steps[place] for place in places]) for places in groups.values()]
    device = steps[0].inputs[0].device
    sent = iter(send_together([each for parts in stacked for each in parts], device))
    results: dict[int, torch.Tensor] = {}
    for places, parts in zip(groups.values(), stacked, strict=True):
        matrices, *inputs = (next(sent) for _ in parts)
        numbers = steps[places[0]].inputs[0].shape[1]
        columns = [each.float().view(len(places), -1, numbers) for each in inputs]
        products = torch.bmm(matrices, torch.cat(columns, dim=1))
        results.update(zip(places, products.unbind(), strict=True))
    return [results[place] for place in range(len(steps))]


def _stack(steps: Sequence[LinearStep]) -> list[torch.Tensor]:
    """The matrices of ``steps``, which have equal shapes, and each of their inputs, as one each."""
    inputs = zip(*(step.inputs for step in steps), strict=True)
    return [torch.stack([step.matrix for step in steps]), *(torch.cat(each) for each in inputs)]
