"""The engine's events about models that it loads and unloads."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from darkroom_server.core.catalog import ModelDescription, WeightOrigin
from darkroom_server.core.model import ModelInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLoad:
    """The load of one model: seconds to load and to warm up, and its weights' bytes.

    ``shared``: the bytes of components that other models may hold too, by a digest of their files
    and their format; they are in memory once. ``host_bytes``: what the host's memory holds of the
    weights, beside those on the device. ``stamp``: see ``file_stamps``, "" for a model of the hub.
    """

    model: str
    load_seconds: float
    warm_up_seconds: float
    bytes_by_component: dict[str, int]
    origin: WeightOrigin = WeightOrigin.DISK
    shared: Mapping[str, int] = field(default_factory=dict)
    host_bytes: int = 0
    stamp: str = ""

    @property
    def weight_bytes(self) -> int:
        """The bytes of all components."""
        return sum(self.bytes_by_component.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLoaded:
    """A model of the catalogue is in the device's memory, which has ``free_bytes`` left."""

    info: ModelInfo
    load: ModelLoad
    free_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInHost:
    """The weights of a model of the catalogue were read into the host's memory.

    ``load.host_bytes`` are those that it holds: 0 if it cannot, and then the model has to be loaded
    from its files.
    """

    load: ModelLoad


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelNotLoaded:
    """A model of the catalogue could not be loaded, for ``reason``; nothing of it is in memory.

    ``out_of_memory``: it may fit once other models are unloaded.
    """

    model: str
    reason: str
    out_of_memory: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelUnloaded:
    """A model is on the device no more, which has ``free_bytes`` left.

    ``host_bytes``: of its weights in the host's memory, 0 if they are not kept there.
    """

    model: str
    free_bytes: int | None = None
    host_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ModelsDescribed:
    """An engine has described models that are new in the catalogue, or whose files have changed."""

    descriptions: tuple[ModelDescription, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFetching:
    """A model is being fetched from the hub; ``fetch_bytes``: of all files, 0 if not known."""

    model: str
    fetched_bytes: int
    fetch_bytes: int
