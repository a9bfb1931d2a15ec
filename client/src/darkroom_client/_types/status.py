"""How a server is doing, and what a request would take there."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class ServerState(StrEnum):
    """Whether a server takes requests.

    LOADING: not yet. READY: it takes and draws them. RECOVERING: it takes them, and they wait for
    an engine that is being started again. DRAINING: not any more. UNKNOWN: in a state that is
    newer than this client.
    """

    LOADING = "loading"
    READY = "ready"
    RECOVERING = "recovering"
    DRAINING = "draining"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTime:
    """What one denoiser pass of ``rows`` rows takes at a size in pixels, in seconds."""

    width: int
    height: int
    rows: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """One model: ``queued_jobs`` wait for it, ``running_jobs`` are being drawn."""

    id: str
    ready: bool
    queued_jobs: int
    running_jobs: int
    pass_times: tuple[PassTime, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """One engine: ``samples`` images of ``jobs`` requests are in it.

    ``restarts``: how often it died and was started again. ``rows_in_use``: rows of its last pass.
    ``memory_bytes``: the device's memory by kind, such as "allocated" and "device_total".
    ``host_memory_bytes``: resident memory of its process.
    """

    index: int
    device: str
    ready: bool
    restarts: int
    jobs: int
    samples: int
    rows_in_use: int
    memory_bytes: Mapping[str, int]
    host_memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStatus:
    """A server at one moment; ``uptime`` in seconds, memory in bytes.

    ``queued_jobs`` of at most ``max_queued_jobs`` wait. ``accepted_jobs`` since the start;
    ``ended_jobs`` counts them by how they ended: "finished", "failed", "expired", "cancelled".
    """

    version: str
    uptime: float
    state: ServerState
    models: tuple[ModelStatus, ...]
    engines: tuple[EngineStatus, ...]
    queued_jobs: int
    max_queued_jobs: int
    running_jobs: int
    accepted_jobs: int
    ended_jobs: Mapping[str, int]
    host_memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a request would take now.

    ``queue_wait``: seconds to its first step. ``run_time``: seconds from there to its last image.
    ``peak_bytes``: memory of the device that its images take at their peak, beside the weights.
    ``available_bytes``: memory that the device has for that.
    """

    queue_wait: float
    run_time: float
    peak_bytes: int
    available_bytes: int

    @property
    def total(self) -> float:
        """Seconds until the last image; a ``timeout`` leaves some room for what comes later."""
        return self.queue_wait + self.run_time
