"""The catalogue: the models that a server may load, as plain data."""

from dataclasses import dataclass
from enum import StrEnum

from darkroom_server.core.model import ModelInfo


class ModelState(StrEnum):
    """Where a model is.

    AVAILABLE: on disk or on the hub, and loaded when a request names it. RESIDENT: on a device.
    HOST: its weights are in the host's memory only, ready to be copied. FAILED: it cannot be
    loaded.
    """

    AVAILABLE = "available"
    LOADING = "loading"
    RESIDENT = "resident"
    HOST = "host"
    FAILED = "failed"


class WeightOrigin(StrEnum):
    """Where the weights of a load came from."""

    DISK = "disk"
    HOST = "host"
    HUB = "hub"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """What the configuration of a model says, before any weight is read.

    ``info``: None if the model cannot be served, for ``reason``. Its revision is "" and its speed
    is empty unless they are known from earlier. ``weight_bytes``: of the weights in memory.
    ``stamp``: see ``file_stamps``, as of before it was described; "" for a model of the hub.
    """

    id: str
    info: ModelInfo | None
    weight_bytes: int = 0
    reason: str = ""
    stamp: str = ""
