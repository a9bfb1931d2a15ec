"""Metrics of the serving process itself: what it had to drop."""

from collections.abc import Callable

from darkroom_server.telemetry.metrics.catalogue import Catalogue


class ProcessMetrics:
    """Counters that other parts of the process keep; each has a function that reads it."""

    def __init__(self, declare: Catalogue) -> None:
        self._dropped_log_lines: Callable[[], int] = lambda: 0
        declare.counter_of(
            "darkroom_log_lines_dropped_total",
            "Log lines that were dropped because the reader of standard error stalled.",
            lambda: self._dropped_log_lines(),
        )
        self._dropped_calls: Callable[[], int] = lambda: 0
        declare.counter_of(
            "darkroom_calls_dropped_total",
            "Calls that gRPC ended before the server saw them, because too many waited or one "
            "waited for 30 seconds; they appear here half a minute later.",
            lambda: self._dropped_calls(),
        )

    def read_dropped_calls(self, read: Callable[[], int]) -> None:
        """Publish the number that ``read`` returns."""
        self._dropped_calls = read

    def read_dropped_log_lines(self, read: Callable[[], int]) -> None:
        """Publish the number that ``read`` returns."""
        self._dropped_log_lines = read
