"""Metrics of the images that callers send."""

from collections.abc import Callable

from darkroom_server.service.uploads import UploadOutcome
from darkroom_server.telemetry.metrics.catalogue import Catalogue
from darkroom_server.uploads.failure import DecodeFailure
from darkroom_server.uploads.store import UploadStore


class UploadMetrics:
    """One attribute per metric."""

    def __init__(self, declare: Catalogue) -> None:
        self.uploads = declare.counter(
            "darkroom_uploads_total",
            "Uploads of images by outcome: stored, known (the server had the file), invalid, "
            "refused, failed or cancelled.",
            ("outcome",),
        )
        self.received_bytes = declare.counter(
            "darkroom_upload_received_bytes_total", "Bytes of uploads that arrived.", ("outcome",)
        )
        self.stored_bytes = declare.gauge(
            "darkroom_upload_stored_bytes", "Bytes of uploaded files that are kept."
        )
        self._evicted: Callable[[], int] = lambda: 0
        declare.counter_of(
            "darkroom_upload_evictions_total",
            "Uploaded files that were removed to make room, or because nobody used them.",
            lambda: self._evicted(),
        )
        self.decode_failures = declare.counter(
            "darkroom_input_decode_failures_total",
            "Images of callers that were not decoded, by reason.",
            ("reason",),
        )
        for outcome in UploadOutcome:
            self.uploads.labels(outcome.value)
            self.received_bytes.labels(outcome.value)
        for failure in DecodeFailure:
            self.decode_failures.labels(failure.value)

    def read_store(self, store: UploadStore) -> None:
        """Read the state of ``store`` at each scrape."""
        self.stored_bytes.set_function(lambda: store.stored_bytes)
        self._evicted = lambda: store.evicted

    def upload_ended(self, outcome: UploadOutcome, received_bytes: int) -> None:
        """An upload ended."""
        self.uploads.labels(outcome.value).inc()
        self.received_bytes.labels(outcome.value).inc(received_bytes)

    def decode_failed(self, failure: DecodeFailure) -> None:
        """An image was not decoded."""
        self.decode_failures.labels(failure.value).inc()
