"""Admits, queues and hands out jobs; knows neither gRPC nor torch."""

from darkroom_server.dispatch.admission.call_limits import ConcurrentCallLimiter
from darkroom_server.dispatch.dispatcher import Dispatcher
from darkroom_server.dispatch.jobs.estimate import Estimate
from darkroom_server.dispatch.jobs.events import ImageDone, JobEvent, Queued, Restarted, Started
from darkroom_server.dispatch.jobs.job import ActiveJob, Finished
from darkroom_server.dispatch.jobs.outcomes import Counts, JobOutcome
from darkroom_server.dispatch.jobs.subscription import Subscription
from darkroom_server.dispatch.observer import NullObserver, Observer
from darkroom_server.dispatch.results import ResultStore
from darkroom_server.dispatch.status import EngineStatus, ModelStatus, Snapshot, State

__all__ = [
    "ActiveJob",
    "ConcurrentCallLimiter",
    "Counts",
    "Dispatcher",
    "EngineStatus",
    "Estimate",
    "Finished",
    "ImageDone",
    "JobEvent",
    "JobOutcome",
    "ModelStatus",
    "NullObserver",
    "Observer",
    "Queued",
    "Restarted",
    "ResultStore",
    "Snapshot",
    "Started",
    "State",
    "Subscription",
]
