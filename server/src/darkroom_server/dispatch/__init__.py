"""Admits, queues and hands out jobs; knows neither gRPC nor torch."""

from darkroom_server.dispatch.accepted import AcceptedJob, Finished
from darkroom_server.dispatch.counts import Counts, End
from darkroom_server.dispatch.dispatcher import Dispatcher
from darkroom_server.dispatch.estimate import Estimate
from darkroom_server.dispatch.observer import Observer, Unobserved
from darkroom_server.dispatch.requests import Requests
from darkroom_server.dispatch.seats import Seats
from darkroom_server.dispatch.snapshot import EngineStatus, ModelStatus, Snapshot, State
from darkroom_server.dispatch.story import ImageDone, JobEvent, Queued, Restarted, Started
from darkroom_server.dispatch.waiter import Waiter

__all__ = [
    "AcceptedJob",
    "Counts",
    "Dispatcher",
    "End",
    "EngineStatus",
    "Estimate",
    "Finished",
    "ImageDone",
    "JobEvent",
    "ModelStatus",
    "Observer",
    "Queued",
    "Requests",
    "Restarted",
    "Seats",
    "Snapshot",
    "Started",
    "State",
    "Unobserved",
    "Waiter",
]
