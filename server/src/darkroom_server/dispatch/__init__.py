"""Admits, queues and hands out jobs; knows neither gRPC nor torch."""

from darkroom_server.dispatch.accepted import AcceptedJob, Finished
from darkroom_server.dispatch.counts import Counts, End
from darkroom_server.dispatch.dispatcher import Dispatcher
from darkroom_server.dispatch.observer import Observer, Unobserved

__all__ = ["AcceptedJob", "Counts", "Dispatcher", "End", "Finished", "Observer", "Unobserved"]
