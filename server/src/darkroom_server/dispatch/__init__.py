"""Admits, queues and hands out jobs; knows neither gRPC nor torch."""

from darkroom_server.dispatch.adapters import AdapterStatus
from darkroom_server.dispatch.admission.availability import Availability, State
from darkroom_server.dispatch.admission.quotas import (
    ConcurrentCallLimiter,
    PeerAddresses,
    counted_as,
    quota_subject,
)
from darkroom_server.dispatch.dispatcher import Dispatcher
from darkroom_server.dispatch.entries import JobEntry, LedgerEntries, LedgerObserver, RunsElsewhere
from darkroom_server.dispatch.estimation.backlog import Backlog
from darkroom_server.dispatch.estimation.estimate import Estimate
from darkroom_server.dispatch.estimation.load_times import LoadTimes
from darkroom_server.dispatch.jobs.events import ImageDone, JobEvent, Queued, Restarted, Started
from darkroom_server.dispatch.jobs.job import ActiveJob
from darkroom_server.dispatch.jobs.outcomes import Counts, Finished, JobOutcome
from darkroom_server.dispatch.jobs.subscription import Subscription
from darkroom_server.dispatch.models.catalog import ModelCatalog
from darkroom_server.dispatch.models.entry import CatalogStatus, LoadProgress
from darkroom_server.dispatch.observer import (
    AdapterMemory,
    DispatchEvent,
    EngineRestarted,
    EngineRetired,
    EngineTimeWasted,
    EstimateChecked,
    FirstPreview,
    JobEnded,
    JobRerun,
    LoadOutcome,
    ModelAdded,
    ModelEvicted,
    ModelLoadEnded,
    ModelRemoved,
    ModelStateChanged,
    Observer,
    ReadyChanged,
    RetryJoined,
    TierBytes,
)
from darkroom_server.dispatch.results import ResultStore
from darkroom_server.dispatch.status import EngineStatus, ModelStatus, Snapshot

__all__ = [
    "ActiveJob",
    "AdapterMemory",
    "AdapterStatus",
    "Availability",
    "Backlog",
    "CatalogStatus",
    "ConcurrentCallLimiter",
    "Counts",
    "DispatchEvent",
    "Dispatcher",
    "EngineRestarted",
    "EngineRetired",
    "EngineStatus",
    "EngineTimeWasted",
    "Estimate",
    "EstimateChecked",
    "Finished",
    "FirstPreview",
    "ImageDone",
    "JobEnded",
    "JobEntry",
    "JobEvent",
    "JobOutcome",
    "JobRerun",
    "LedgerEntries",
    "LedgerObserver",
    "LoadOutcome",
    "LoadProgress",
    "LoadTimes",
    "ModelAdded",
    "ModelCatalog",
    "ModelEvicted",
    "ModelLoadEnded",
    "ModelRemoved",
    "ModelStateChanged",
    "ModelStatus",
    "Observer",
    "PeerAddresses",
    "Queued",
    "ReadyChanged",
    "Restarted",
    "ResultStore",
    "RetryJoined",
    "RunsElsewhere",
    "Snapshot",
    "Started",
    "State",
    "Subscription",
    "TierBytes",
    "counted_as",
    "quota_subject",
]
