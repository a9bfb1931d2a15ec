"""Metrics of HTTP requests, by route and status."""

from darkroom_server.telemetry.metrics.calls import MESSAGE_BUCKETS
from darkroom_server.telemetry.metrics.catalogue import Catalogue
from darkroom_server.telemetry.metrics.requests import REQUEST_BUCKETS

METHODS = ("GET", "HEAD", "OPTIONS", "POST")
OTHER_METHOD = "other"


class HttpMetrics:
    """The HTTP door's ``HttpObserver``; one attribute for each metric."""

    def __init__(self, declare: Catalogue) -> None:
        self.in_flight = declare.gauge(
            "darkroom_http_requests_in_flight", "HTTP requests that are not answered yet."
        )
        self.requests = declare.counter(
            "darkroom_http_requests_total",
            "HTTP requests, by route and status; 499 if the caller disconnected.",
            ("method", "route", "status"),
        )
        self.seconds = declare.histogram(
            "darkroom_http_request_seconds",
            "Seconds from the headers of a request to the end of its answer.",
            ("route",),
            REQUEST_BUCKETS,
        )
        self.sent_bytes = declare.histogram(
            "darkroom_http_sent_body_bytes",
            "Sizes of the bodies of answers.",
            ("route",),
            MESSAGE_BUCKETS,
        )

    def request_started(self) -> None:
        """A request begins."""
        self.in_flight.inc()

    def request_ended(self, method: str, route: str, status: int, seconds: float) -> None:
        """It ended with ``status``."""
        self.in_flight.dec()
        self.requests.labels(
            method if method in METHODS else OTHER_METHOD, route, str(status)
        ).inc()
        self.seconds.labels(route).observe(seconds)

    def body_sent(self, route: str, size: int) -> None:
        """An answer had ``size`` bytes of body."""
        self.sent_bytes.labels(route).observe(size)
