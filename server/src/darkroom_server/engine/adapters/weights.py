"""The weights of a LoRA adapter in memory, and which adapters a row of a batch has."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from darkroom_server.core.job import Job

Mix = tuple[tuple[str, float], ...]
"""The adapters of a row: pairs of an id and a scale, in the order of the request."""


def mix_of(job: Job) -> Mix:
    """The adapters of the rows of ``job``'s images. One with a scale of 0 has no effect."""
    return tuple((lora.id, lora.scale) for lora in job.active_loras)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerWeights:
    """What an adapter adds to one layer: ``up`` @ ``down`` @ x.

    ``down`` is [rank, inputs], [rank, inputs, height, width] for a convolution. ``up`` is
    [outputs, rank], and alpha / rank is multiplied into it. ``magnitude``, [outputs], makes it a
    DoRA layer (Liu et al. 2024): the length of each row of the layer's adapted weight.
    """

    down: torch.Tensor
    up: torch.Tensor
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """The rank of what is added."""
        return self.down.shape[0]

    @property
    def elements(self) -> int:
        """The numbers in all tensors."""
        given = (self.down, self.up, self.magnitude)
        return sum(tensor.numel() for tensor in given if tensor is not None)

    def to(self, dtype: torch.dtype) -> "LayerWeights":
        """These weights as ``dtype``."""
        return LayerWeights(
            down=self.down.to(dtype),
            up=self.up.to(dtype),
            magnitude=None if self.magnitude is None else self.magnitude.to(dtype),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdapterWeights:
    """One adapter of one model: for each of its components the layers that the adapter changes.

    The tensors are in host memory, or on the meta device if only the headers were read.
    """

    id: str
    components: Mapping[str, Mapping[str, LayerWeights]]

    @property
    def rank(self) -> int:
        """The greatest rank of a layer."""
        return max(layer.rank for layers in self.components.values() for layer in layers.values())

    def bytes_as(self, dtype: torch.dtype) -> int:
        """The bytes of all tensors as ``dtype``."""
        layers = [layer for layers in self.components.values() for layer in layers.values()]
        return sum(layer.elements for layer in layers) * dtype.itemsize

    def to(self, dtype: torch.dtype) -> "AdapterWeights":
        """These weights as ``dtype``."""
        components = {
            name: {layer: weights.to(dtype) for layer, weights in layers.items()}
            for name, layers in self.components.items()
        }
        return AdapterWeights(id=self.id, components=components)
