"""What loads find of models by calling them, and later loads need not find again."""

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class Findings:
    """Kept for as long as the engine runs: a few kilobytes for each architecture and each VAE.

    ``row_layers`` are those of ``row_layers_of``, by architecture. ``preview_maps`` are those of
    ``Previewer``, by the key of the VAE's weights.
    """

    row_layers: dict[Hashable, frozenset[str]] = field(default_factory=dict)
    preview_maps: dict[str, torch.Tensor] = field(default_factory=dict)
