"""What an adapter on the server is."""

from dataclasses import dataclass
from enum import StrEnum


class AdapterKind(StrEnum):
    """What an adapter is. UNKNOWN: the value is newer than this client."""

    LORA = "lora"
    CONTROLNET = "controlnet"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter that requests may name: a LoRA, or a ControlNet.

    ``models``: the ids of the models that it fits. ``rank``: the greatest of its layers, 0 for a
    ControlNet.
    ``bytes``: its weights in memory. ``resident``: an engine has it in memory; a request for
    another one waits until it is read. ``rejection``: why the server rejects requests for it, such
    as a rank above its limit; empty if it does not.
    """

    id: str
    kind: AdapterKind = AdapterKind.LORA
    models: tuple[str, ...] = ()
    rank: int = 0
    bytes: int = 0
    resident: bool = False
    rejection: str = ""
