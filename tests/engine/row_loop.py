"""A denoiser that goes through the rows of a batch one by one, between its repeated blocks."""

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn


class LoopBlock(nn.Module):
    """Changes all rows at once."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.linear = nn.Linear(channels, channels)

    def forward(
        self, hidden: torch.Tensor, shifts: tuple[torch.Tensor, torch.Tensor], mask: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The changed rows [rows, pixels, channels], and the mean of each row."""
        first, last = shifts
        found = hidden + torch.tanh(self.linear(self.norm(hidden) + first)) * last
        return found, found.mean(dim=(1, 2))


class RowLoop(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Its graph as a whole is for one number of rows."""

    _repeated_blocks = ("LoopBlock",)

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, channels: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([LoopBlock(channels) for _ in range(depth)])

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = False
    ) -> tuple[torch.Tensor]:
        """The predictions for ``sample`` [rows, channels, height, width]."""
        shifts = timestep[:, None, None] / 1000, torch.ones_like(timestep)[:, None, None]
        hidden = sample.flatten(2).transpose(1, 2)
        for block in self.blocks:
            hidden, _ = block(hidden, shifts, mask=None)
            hidden = torch.stack([row / (row.abs().max() + 1) for row in hidden])
        return (hidden.transpose(1, 2).reshape(sample.shape),)
