"""Layers of one module that take the same input, one after another, as q, k and v of attention do.

The down products of their adapters are one product, which reads the input once.
"""

import torch


class SharedInputs:
    """The down products of one plan. Its first call of a module finds which layers share an input.

    An input is recognized as the same tensor object, so it must not change between the layers.
    """

    def __init__(self) -> None:
        self._groups: dict[str, _Group] = {}
        self._last: _Group | None = None
        self._last_input: torch.Tensor | None = None

    def down(self, layer: str, x: torch.Tensor, across: torch.Tensor) -> torch.Tensor:
        """[rows, tokens, rank]: ``x`` [rows, …, features] by ``across`` [rows, features, rank]."""
        group = self._groups.get(layer)
        if group is not None:
            self._last_input = None
            return group.down(layer, x)
        if self._last is None or x is not self._last_input:
            self._last, self._last_input = _Group(), x
        self._last.add(layer, across)
        self._groups[layer] = self._last
        return _product(x, across)


class _Group:
    def __init__(self) -> None:
        self._across: dict[str, torch.Tensor] = {}
        self._joint: torch.Tensor | None = None
        self._input: torch.Tensor | None = None
        self._parts: dict[str, torch.Tensor] = {}

    def add(self, layer: str, across: torch.Tensor) -> None:
        """Add a layer that takes the same input."""
        self._across[layer] = across

    def down(self, layer: str, x: torch.Tensor) -> torch.Tensor:
        """The product of ``layer``; the first layer that gets ``x`` computes those of all."""
        if len(self._across) == 1:
            return _product(x, self._across[layer])
        if x is not self._input or layer not in self._parts:
            if self._joint is None:
                self._joint = torch.cat(list(self._across.values()), dim=2)
            ranks = [each.shape[2] for each in self._across.values()]
            products = _product(x, self._joint).split(ranks, dim=2)
            self._input, self._parts = x, dict(zip(self._across, products, strict=True))
        part = self._parts.pop(layer)
        if not self._parts:  # Nobody else needs them.
            self._input = None
        return part


def _product(x: torch.Tensor, across: torch.Tensor) -> torch.Tensor:
    return torch.bmm(x.reshape(x.shape[0], -1, x.shape[-1]), across)
