"""The weights of one component, apart from the modules that use them.

Several models may hold modules of one part, and the host may hold a part whose model is not on the
device: a module is made from it without reading a file.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import structlog
import torch

from darkroom_server.engine.failures import one_line
from darkroom_server.engine.weights.owned import owned
from darkroom_server.engine.weights.stored import is_plain, is_quantized, stored_bytes

log = structlog.get_logger(__name__)

Weights = tuple[torch.Tensor, ...]


class Part:
    """One component of a model, whose weights have the format in which it runs.

    ``key`` is equal for parts with equal weights, "" if that is not known. ``device_weights`` are
    None if no model on the device uses the part, ``host_weights`` if the host's memory does not
    hold it. On a CPU they are the same tensors, and so are those of an ``offloaded`` part, which
    stays in the host's memory. ``reusable``: modules can be made of it, as of all that no quantiser
    has packed.
    """

    def __init__(self, module: torch.nn.Module, key: str = "", *, offloaded: bool = False) -> None:
        self.key = key
        self.offloaded = offloaded
        self.device_weights: Weights | None = None
        self.host_weights: Weights | None = None
        self.bytes = 0
        self._structure: torch.nn.Module | None = None
        if is_quantized(module):
            return
        try:
            self._structure = _with_weights(module, map(_absent, weights_in(module)))
        except Exception as error:  # noqa: BLE001 - a class may hold what cannot be copied.
            log.info("component cannot be shared", of=type(module).__name__, why=one_line(error))

    @property
    def reusable(self) -> bool:
        """Whether ``module`` can be called."""
        return self._structure is not None

    def take(self, module: torch.nn.Module, device: torch.device, *, keep: bool) -> None:
        """Take the weights of ``module``, which is on the CPU, and move it to ``device``.

        ``module`` is the one that the part was made of; since then its weights may have got
        another type. ``keep``: the host's memory holds them too.
        """
        found = weights_in(module)
        if device.type == "cpu" or self.offloaded:
            for weight in filter(is_plain, found):
                weight.data = owned(weight.data) if device.type == "cpu" else weight.pin_memory()
            self.host_weights = self.device_weights = tuple(each.data for each in found)
        else:
            if keep and self.reusable:
                self.host_weights = _pinned(found)
            # Packed weights do not know the conversions of inference mode.
            inference = torch.is_inference_mode_enabled() and not is_quantized(module)
            with torch.inference_mode(inference):
                module.to(device=device)
            self.device_weights = tuple(each.data for each in weights_in(module))
        self.bytes = sum(map(stored_bytes, found))

    def take_into_host(self, module: torch.nn.Module, device: torch.device) -> None:
        """Take the weights of ``module`` into the host's memory, for a later copy to ``device``.

        The host does not hold those of a part that is not reusable, or for which it has no room.
        """
        found = weights_in(module)
        self.bytes = sum(map(stored_bytes, found))
        if not self.reusable:
            return
        if device.type != "cpu":
            self.host_weights = _pinned(found)
            return
        for weight in found:
            weight.data = owned(weight.data)
        self.host_weights = tuple(each.data for each in found)

    def keep(self) -> None:
        """Let the host's memory hold the weights too, if it has room for them."""
        if self.host_weights is None and self.device_weights is not None:
            self.host_weights = _pinned([each.cpu() for each in self.device_weights])

    def borrowed(self) -> torch.nn.Module:
        """A module with these weights, on the host or the device, which is not to be called."""
        weights = self.device_weights if self.host_weights is None else self.host_weights
        assert self._structure is not None
        assert weights is not None
        module: torch.nn.Module = _with_weights(self._structure, weights)
        return module

    def module(self, device: torch.device) -> torch.nn.Module:
        """A new module with these weights, on ``device``.

        The part must be reusable, and on the device or on the host.
        """
        assert self._structure is not None
        weights = self.device_weights
        if weights is None:
            assert self.host_weights is not None
            weights = self.host_weights
            if not self.offloaded:
                weights = tuple(each.to(device, non_blocking=True) for each in weights)
            self.device_weights = weights
        module: torch.nn.Module = _with_weights(self._structure, weights)
        return module


def weights_in(module: torch.nn.Module) -> Weights:
    """The parameters and buffers of ``module``, each once, in an order that copies share."""
    return (*module.parameters(), *module.buffers())


def _with_weights(module: torch.nn.Module, weights: Iterable[torch.Tensor]) -> Any:
    """A copy of ``module`` with other weights, in the order of ``weights_in``."""
    memo: dict[int, Any] = {}
    for old, new in zip(weights_in(module), weights, strict=True):
        if isinstance(old, torch.nn.Parameter):
            new = torch.nn.Parameter(new, requires_grad=False)
        memo[id(old)] = new
    return copy.deepcopy(module, memo)


def _absent(weight: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(weight, device="meta")


def _pinned(weights: Sequence[torch.Tensor]) -> Weights | None:
    """Move ``weights`` into memory from which a GPU copies fast; None if there is too little."""
    try:
        for weight in weights:
            weight.data = weight.data.pin_memory()
    except (RuntimeError, MemoryError) as error:
        # The model is loaded all the same, and the host does not keep it.
        log.warning("too little memory to keep a component on the host", why=one_line(error))
        return None
    return tuple(weight.data for weight in weights)
