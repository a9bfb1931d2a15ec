"""What weights take in memory, quantised ones too."""

from typing import Any

import torch


def stored_bytes(weight: torch.Tensor) -> int:
    """The bytes of ``weight``: of its parts, if a quantiser stores it as several tensors."""
    flatten: Any = getattr(weight, "__tensor_flatten__", None)
    if flatten is None or is_plain(weight):
        return weight.numel() * weight.element_size()
    names, _ = flatten()
    return sum(stored_bytes(getattr(weight, name)) for name in names)


def is_plain(weight: torch.Tensor) -> bool:
    """Whether ``weight`` is a tensor of torch itself, which no quantiser has packed."""
    return type(weight) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def is_quantized(module: torch.nn.Module) -> bool:
    """Whether a quantiser has packed a weight of ``module``."""
    return not all(map(is_plain, (*module.parameters(), *module.buffers())))
