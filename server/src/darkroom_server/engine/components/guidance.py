"""Classifier-free guidance (Ho and Salimans 2022), as in diffusers' pipelines."""

import torch


def guide(prediction: torch.Tensor, scale: float) -> torch.Tensor:
    """Combine the rows of one sample: from [2, ...], negative prompt first, to [1, ...]."""
    unconditional, conditional = prediction.chunk(2)
    return unconditional + scale * (conditional - unconditional)
