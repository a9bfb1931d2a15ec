"""The batch: the samples that one forward pass of the denoiser serves."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from darkroom_server.engine.sample import Sample


@dataclass(frozen=True, slots=True)
class Group:
    """Samples of one group can share a batch: same model, same shapes.

    ``width`` and ``height`` are an image's, in pixels; ``tokens`` are those of its prompt, or 0 if
    ``key`` covers them. ``key`` is whatever else must be equal.
    """

    model: str
    width: int
    height: int
    tokens: int = 0
    key: Hashable = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples of one group; each takes one step when the batch runs.

    ``rows`` are those of all samples together. ``joined`` is the number of samples that take their
    first step in a batch with samples that are already further.
    """

    group: Group
    samples: "tuple[Sample, ...]"
    rows: int
    joined: int

    @property
    def model(self) -> str:
        """The id of the model that all samples use."""
        return self.group.model

    @classmethod
    def of(cls, samples: "Sequence[Sample]") -> Self:
        """The batch of ``samples``, which are of one group and not empty."""
        newcomers = sum(not sample.step for sample in samples)
        return cls(
            group=samples[0].group,
            samples=tuple(samples),
            rows=sum(sample.rows for sample in samples),
            joined=newcomers if newcomers < len(samples) else 0,
        )
