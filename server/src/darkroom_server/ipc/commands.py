"""Commands to a running engine; a ``core.job.Job`` itself is the command to run it."""

from dataclasses import dataclass

from darkroom_server.core.engine_config import AdapterSource, ModelSource
from darkroom_server.core.model import ModelInfo


@dataclass(frozen=True, slots=True)
class Cancel:
    """Cancel a job at the next step boundary."""

    job_id: str


@dataclass(frozen=True, slots=True)
class Extend:
    """Replace a job's deadline, in ``time.monotonic`` seconds; None means no deadline."""

    job_id: str
    deadline: float | None


@dataclass(frozen=True, slots=True)
class CheckAdapter:
    """Emit which models an adapter fits."""

    source: AdapterSource


@dataclass(frozen=True, slots=True)
class OfferAdapter:
    """Let later jobs use an adapter, whose source is a file."""

    source: AdapterSource


@dataclass(frozen=True, slots=True)
class WithdrawAdapter:
    """Free an adapter's memory once no job uses it."""

    id: str


@dataclass(frozen=True, slots=True)
class LoadModel:
    """Load a model of the catalogue beside the jobs that run.

    ``adapters`` are those on offer now. ``previous``: the model as it was loaded before, None if it
    never was. ``keep``: the host's memory holds its weights too, if it is not the device's.
    ``host_only``: they are read into the host's memory, and not onto the device.
    """

    source: ModelSource
    adapters: tuple[AdapterSource, ...] = ()
    previous: ModelInfo | None = None
    keep: bool = False
    host_only: bool = False


@dataclass(frozen=True, slots=True)
class UnloadModel:
    """Free a model's memory once no job uses it.

    ``keep``: only that of the device; its weights stay in the host's memory.
    """

    id: str
    keep: bool = False


@dataclass(frozen=True, slots=True)
class DescribeModels:
    """Describe models that were added to the catalogue; ``adapters`` are those on offer now."""

    sources: tuple[ModelSource, ...]
    adapters: tuple[AdapterSource, ...] = ()


@dataclass(frozen=True, slots=True)
class Close:
    """End the loop at the next step boundary."""
