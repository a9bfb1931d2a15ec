"""The batch: the samples that one forward pass of the denoiser serves."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from darkroom_server.engine.sample import Sample


@dataclass(frozen=True, slots=True)
class Group:
    """Samples of one group can share a batch: same model, same shapes.

    ``width`` and ``height`` are a job's ``denoised_size``, or the side of ``common_square`` if
    sizes mix. ``key`` is whatever else must be equal.
    """

    model: str
    width: int
    height: int
    key: Hashable = None


def common_square(width: int, height: int) -> int:
    """The side of a square that images of many sizes have in common, in pixels.

    Its side is 2^n or 3·2^n, the smallest with as many pixels as ``width`` × ``height``. Images
    with the same one can share a batch: if they are padded to the largest, none has more than 2.25
    times its own pixels.
    """
    side = 1
    while side * side < width * height:
        side = side * 4 // 3 if side % 3 == 0 else max(2, side * 3 // 2)
    return side


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

    @property
    def largest(self) -> tuple[int, int]:
        """Width and height of the image with the most pixels, see ``Job.denoised_size``."""
        sizes = [sample.job.denoised_size for sample in self.samples]
        return max(sizes, key=lambda size: size[0] * size[1])

    @property
    def adapters(self) -> int:
        """The number of different adapters of all rows."""
        return len({lora.id for s in self.samples for lora in s.job.active_loras})

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
