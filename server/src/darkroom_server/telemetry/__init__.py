"""Metrics, their HTTP exporter, and traces."""

from darkroom_server.telemetry.exporter import Exporter
from darkroom_server.telemetry.metrics import Metrics
from darkroom_server.telemetry.traces import open_traces

__all__ = ["Exporter", "Metrics", "open_traces"]
