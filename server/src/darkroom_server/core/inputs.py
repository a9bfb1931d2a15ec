"""What a job brings besides text: images and adapters, as plain data."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class InputImage:
    """A decoded picture. ``digest`` is "sha256:" and the SHA-256 of the file it came in, in hex.

    ``pixels`` are height × width × ``channels`` bytes: 3 for RGB, 1 for gray. They are empty once
    its job has ended.
    """

    digest: str
    width: int
    height: int
    channels: int
    pixels: bytes = field(repr=False)

    @property
    def size_bytes(self) -> int:
        """The bytes of its pixels, whether or not they are there."""
        return self.width * self.height * self.channels


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """A LoRA adapter of a job: the id that the server offers it by, and how strong it is."""

    id: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """A ControlNet of a job. ``image`` has the size of the job's images.

    It is applied from ``start`` to ``end``, as parts of the steps, 0 to 1.
    """

    id: str
    image: InputImage
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
