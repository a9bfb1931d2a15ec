"""A ControlNet of one sample."""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleControl:
    """A ControlNet that a sample asks for: its id, and its input ``condition``.

    The condition has a row for each of the sample's, or a single one for all. It is applied from
    ``start`` to ``end``, as parts of the steps.
    """

    id: str
    condition: torch.Tensor = field(repr=False)
    scale: float
    start: float
    end: float

    @property
    def bytes(self) -> int:
        """The bytes of its condition."""
        return self.condition.untyped_storage().nbytes()

    def applies(self, step: int, steps: int) -> bool:
        """Whether it changes step ``step``, from 0, of ``steps`` steps."""
        # The comparisons of diffusers: others round otherwise.
        outside = step / steps < self.start or (step + 1) / steps > self.end
        return self.scale != 0 and not outside
