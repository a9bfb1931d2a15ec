"""An embedding: a prompt as the denoiser's input."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Embedding:
    """A prompt as the denoiser's input.

    ``hidden`` is [1, tokens, width], with the widths of all text encoders together. ``pooled`` is
    [1, width] of the last encoder, None for a family without it. ``truncated``: the end of the
    prompt was cut off.
    """

    hidden: torch.Tensor
    truncated: bool
    pooled: torch.Tensor | None = None

    @property
    def bytes(self) -> int:
        """The bytes of its tensors."""
        return self.hidden.nbytes + (self.pooled.nbytes if self.pooled is not None else 0)
