"""What the server counts, and where Prometheus reads it."""

from darkroom_server.telemetry.exporter import Exporter
from darkroom_server.telemetry.metrics import Metrics
from darkroom_server.telemetry.recorder import Recorder
from darkroom_server.telemetry.traces import open_traces

__all__ = ["Exporter", "Metrics", "Recorder", "open_traces"]
