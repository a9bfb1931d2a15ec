"""Which calls wait for their device, so that they cannot be recorded as graphs.

A capture that such a call breaks cannot be ended in order: the process would have to be.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = frozenset(
    {
        "_local_scalar_dense",
        "_unique2",
        "bincount",
        "equal",
        "is_nonzero",
        "item",
        "masked_select",
        "nonzero",
        "unique_consecutive",
        "unique_dim",
    }
)
"""Operators whose result, or its size, the host reads."""

COPIES = frozenset({"_to_copy", "copy", "copy_", "to"})
"""Operators that copy a tensor of one number too; others read it on the host."""


class WaitsForDevice(Exception):
    """A call waits for its device; the message says in which operator."""


@contextmanager
def refusing_waits(device: torch.device) -> Iterator[None]:
    """Raise ``WaitsForDevice`` in an operator of this thread that waits for ``device``."""
    with _RefusingWaits(device):
        yield


class _RefusingWaits(TorchDispatchMode):
    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._type = device.type

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name: str = func._overloadpacket.__name__
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        if any(self._is_there(each) for each in given) and (
            name in WAITING or (name.startswith("index") and any(map(_is_mask, given[1:])))
        ):
            raise WaitsForDevice(f"it waits for the device in {name}")
        found = func(*args, **(kwargs or {}))
        made = [each for each in tree_leaves(found) if isinstance(each, torch.Tensor)]
        others = made + [each for each in given if each.ndim or name in COPIES]
        if len({self._is_there(each) for each in others}) > 1:
            raise WaitsForDevice(f"it copies between the device and the host in {name}")
        return found

    def _is_there(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == self._type


def _is_mask(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.bool, torch.uint8)
