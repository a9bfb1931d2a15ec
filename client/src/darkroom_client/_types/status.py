"""The state of a server, and the estimate for a request."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from darkroom_client._types.model import ModelLoad, ModelRuntime, ModelState, RowLimitSource


class ServerState(StrEnum):
    """Whether a server accepts requests.

    LOADING: not yet. READY: it accepts and runs them. RECOVERING: it accepts them, and they wait
    until an engine has restarted. DRAINING: not any more. UNKNOWN: a state that is newer than this
    client.
    """

    LOADING = "loading"
    READY = "ready"
    RECOVERING = "recovering"
    DRAINING = "draining"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTime:
    """The duration in seconds of a denoiser pass of ``rows`` rows at a size in pixels."""

    width: int
    height: int
    rows: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """One model: ``queued_jobs`` wait for it, ``running_jobs`` run.

    ``runtime``: how it runs. ``max_rows``: the most rows of one denoiser pass at its default size,
    now. Until it is ready, or if the server is older than these fields, they are None and 0.
    ``state``, ``state_reason``, ``weight_bytes``, ``last_used``, ``pinned`` and ``load``: as those
    of ``Model``.
    """

    id: str
    ready: bool
    queued_jobs: int
    running_jobs: int
    pass_times: tuple[PassTime, ...]
    runtime: ModelRuntime | None = None
    max_rows: int = 0
    row_limit_source: RowLimitSource = RowLimitSource.UNKNOWN
    state: ModelState = ModelState.UNKNOWN
    state_reason: str = ""
    weight_bytes: int = 0
    last_used: datetime | None = None
    pinned: bool = False
    load: ModelLoad | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """One engine: it holds ``samples`` images of ``jobs`` jobs.

    ``restarts``: how often it crashed and restarted. ``rows_in_use``: rows of its last pass.
    ``memory_bytes``: the device's memory by kind, such as "allocated" and "device_total".
    ``host_memory_bytes``: resident memory of its process. ``weight_bytes``: the weights of models
    that it holds, by tier, "device" and "host"; empty if the server is older than this field.
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
    weight_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStatus:
    """A snapshot of a server; ``uptime`` in seconds, memory in bytes.

    ``queued_jobs`` wait, of at most ``max_queued_jobs``. ``accepted_jobs``: since the start;
    ``ended_jobs`` counts them by outcome: "finished", "failed", "expired", "cancelled".
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
    """The estimate for a request that would be sent now.

    ``queue_wait``: seconds to its first step. ``run_time``: seconds from there to its last image.
    ``peak_bytes``: peak device memory of its images, without the weights. ``available_bytes``:
    device memory that is available for them.
    """

    queue_wait: float
    run_time: float
    peak_bytes: int
    available_bytes: int

    @property
    def total(self) -> float:
        """Seconds until the last image; choose a somewhat longer ``timeout``."""
        return self.queue_wait + self.run_time
