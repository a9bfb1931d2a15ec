"""What the dispatcher reports to telemetry."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from darkroom_server.core.catalog import ModelState, WeightOrigin
from darkroom_server.core.events import Event
from darkroom_server.dispatch.jobs.outcomes import JobOutcome


@dataclass(frozen=True, slots=True)
class ReadyChanged:
    """``ready``: jobs are accepted, and an engine can run them."""

    ready: bool


@dataclass(frozen=True, slots=True)
class JobEnded:
    """An accepted job ended; ``phase`` is ``ActiveJob.phase`` at that moment."""

    model: str
    outcome: JobOutcome
    phase: str


@dataclass(frozen=True, slots=True)
class JobRerun:
    """A job runs again because its engine died."""

    model: str


@dataclass(frozen=True, slots=True)
class RetryJoined:
    """A retried request joined the job that its first try began."""

    model: str


@dataclass(frozen=True, slots=True)
class FirstPreview:
    """The first preview of a job exists, ``seconds`` after the job arrived."""

    model: str
    seconds: float


@dataclass(frozen=True, slots=True)
class EstimateChecked:
    """A job that was estimated to take ``estimate`` seconds took ``seconds``."""

    model: str
    estimate: float
    seconds: float


@dataclass(frozen=True, slots=True)
class EngineTimeWasted:
    """A job left the engine unfinished after ``seconds`` of its batches."""

    model: str
    seconds: float


@dataclass(frozen=True, slots=True)
class AdapterMemory:
    """All engines together hold ``bytes`` of an adapter of ``model`` now."""

    model: str
    adapter: str
    bytes: int


@dataclass(frozen=True, slots=True)
class EngineRestarted:
    """An engine that died starts again."""


@dataclass(frozen=True, slots=True)
class EngineRetired:
    """An engine will not be started again; the others continue."""


class LoadOutcome(StrEnum):
    """How the load of a model ended."""

    LOADED = "loaded"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ModelLoadEnded:
    """The load of a model ended, ``seconds`` after it began beside jobs; 0 for one at the start."""

    model: str
    origin: WeightOrigin
    outcome: LoadOutcome
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelEvicted:
    """A model was unloaded to make room for another."""

    model: str


@dataclass(frozen=True, slots=True)
class ModelStateChanged:
    """A model of the catalogue is in another state now."""

    model: str
    state: ModelState


@dataclass(frozen=True, slots=True)
class ModelAdded:
    """A model is new in the catalogue."""

    model: str


@dataclass(frozen=True, slots=True)
class ModelRemoved:
    """A model is in the catalogue no more."""

    model: str


@dataclass(frozen=True, slots=True)
class TierBytes:
    """The weights that the engine with the index ``engine`` holds now, by tier."""

    engine: int
    by_tier: Mapping[str, int]


DispatchEvent = (
    ReadyChanged
    | JobEnded
    | JobRerun
    | RetryJoined
    | FirstPreview
    | EstimateChecked
    | EngineTimeWasted
    | AdapterMemory
    | EngineRestarted
    | EngineRetired
    | ModelLoadEnded
    | ModelEvicted
    | ModelStateChanged
    | ModelAdded
    | ModelRemoved
    | TierBytes
)


class Observer:
    """Receives what the dispatcher does; this one ignores it."""

    def on_event(self, event: Event | DispatchEvent) -> None:
        """Record ``event``: on the event loop, without blocking, and without raising.

        Of the engine's events come those that are not about a single job.
        """
