"""Copies from the host to a device that the host does not wait for."""

import torch


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` on ``device``.

    A GPU copies it from pinned memory when its queue comes to it; torch keeps that memory until
    then. Memory that can be paged out would be copied while the host waits.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
