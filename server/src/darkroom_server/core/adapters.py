"""What a server offers to add to its models: LoRA adapters and ControlNets."""

from dataclasses import dataclass
from enum import StrEnum


class AdapterKind(StrEnum):
    """What an adapter is."""

    LORA = "lora"
    CONTROLNET = "controlnet"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterOffer:
    """An adapter that fits a model. ``rank`` is its greatest, ``bytes`` are those in memory.

    ``rejection``: why requests for it are rejected, empty if they are not. ``cost``: seconds that
    a ControlNet takes for a batch, as a part of those of the denoiser.
    """

    id: str
    rank: int
    bytes: int
    kind: AdapterKind = AdapterKind.LORA
    rejection: str = ""
    cost: float = 0.0
