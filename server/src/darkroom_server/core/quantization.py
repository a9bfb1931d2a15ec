"""How the weights of a model are stored in fewer bits, as plain data."""

from dataclasses import dataclass
from enum import StrEnum


class Quantization(StrEnum):
    """A way to store weights in fewer bits.

    INT8: linear layers of the denoiser and the text encoders in 8-bit integers. FP8: the denoiser
    in 8-bit floats. FP8_DYNAMIC: linear layers of the denoiser in 8-bit floats, and their products
    too, with scales of each call's activations, on a GPU. NF4: linear layers of both in 4 bits, on
    a GPU. GGUF: the denoiser from a GGUF file.
    """

    INT8 = "int8"
    FP8 = "fp8"
    FP8_DYNAMIC = "fp8-dynamic"
    NF4 = "nf4"
    GGUF = "gguf"


@dataclass(frozen=True, slots=True)
class Quantize:
    """What the operator asked for; ``file`` is set for GGUF only."""

    kind: Quantization
    file: str | None = None


class Offload(StrEnum):
    """What stays in the host's memory, and is copied to the device for each of its calls.

    TEXT_ENCODER: the text encoders. GROUP: the denoiser too, layer by layer.
    """

    NONE = "none"
    TEXT_ENCODER = "text-encoder"
    GROUP = "group"
