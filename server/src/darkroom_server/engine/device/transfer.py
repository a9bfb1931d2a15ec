"""Copies from the host to a device that the host does not wait for."""

import itertools
from collections.abc import Sequence

import torch

ALIGNMENT = 256
"""Bytes: of the tensors of one copy, as kernels expect them from CUDA's own allocator."""


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` on ``device``.

    A GPU copies it from pinned memory when its queue comes to it; torch keeps that memory until
    then. Memory that can be paged out would be copied while the host waits.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def send_together(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """``tensors`` on ``device``, as ``send``, but those that are on the CPU in one copy."""
    from_host = [tensor for tensor in tensors if tensor.device.type == "cpu"]
    if device.type == "cpu" or not from_host:
        return list(tensors)
    sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in from_host]
    *starts, end = itertools.accumulate(sizes, initial=0)
    packed = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for start, tensor in zip(starts, from_host, strict=True):
        _part(packed, start, tensor).copy_(tensor)
    there = packed.to(device, non_blocking=True)
    sent = iter(starts)
    return [
        _part(there, next(sent), tensor) if tensor.device.type == "cpu" else tensor
        for tensor in tensors
    ]


def _part(packed: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    """The bytes of ``packed`` from ``start`` as a tensor like ``like``."""
    return packed[start : start + like.nbytes].view(like.dtype).view(like.shape)
