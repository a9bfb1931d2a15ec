"""Metrics of gRPC calls, under the names that gRPC dashboards expect."""

from darkroom_server.telemetry.metrics.catalogue import Catalogue
from darkroom_server.telemetry.metrics.requests import REQUEST_BUCKETS

LABELS = ("grpc_type", "grpc_service", "grpc_method")

MESSAGE_BUCKETS = (256, 1024, 4096, 16_384, 65_536, 262_144, 1_048_576, 4_194_304, 16_777_216)
"""Bytes. Requests are small; a reply may hold several images."""


class CallMetrics:
    """The interceptors' ``CallObserver``; one attribute for each metric."""

    def __init__(self, declare: Catalogue) -> None:
        self.started = declare.counter("grpc_server_started_total", "Calls started.", LABELS)
        self.handled = declare.counter(
            "grpc_server_handled_total", "Calls finished, by status code.", (*LABELS, "grpc_code")
        )
        self.handling_seconds = declare.histogram(
            "grpc_server_handling_seconds",
            "Seconds from the start of a call to its end.",
            LABELS,
            REQUEST_BUCKETS,
        )
        self.received_bytes = declare.histogram(
            "grpc_server_received_message_bytes",
            "Sizes of received protobuf messages.",
            LABELS,
            MESSAGE_BUCKETS,
        )
        self.sent_bytes = declare.histogram(
            "grpc_server_sent_message_bytes",
            "Sizes of sent protobuf messages.",
            LABELS,
            MESSAGE_BUCKETS,
        )

    def call_started(self, service: str, method: str, kind: str) -> None:
        """A call begins."""
        self.started.labels(kind, service, method).inc()

    def call_handled(self, service: str, method: str, kind: str, code: str, seconds: float) -> None:
        """A call ended with ``code``."""
        self.handled.labels(kind, service, method, code).inc()
        self.handling_seconds.labels(kind, service, method).observe(seconds)

    def message(self, service: str, method: str, kind: str, size: int, *, sent: bool) -> None:
        """A message of ``size`` bytes was received, or sent."""
        sizes = self.sent_bytes if sent else self.received_bytes
        sizes.labels(kind, service, method).observe(size)
