"""Metrics of the ledger of accepted jobs."""

from darkroom_server.telemetry.metrics.catalogue import Catalogue

SECONDS_BUCKETS = (0.0001, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0)
"""Memory takes microseconds, a commit to a disk some milliseconds."""

CAUSES = ("server_died", "queued")


class LedgerMetrics:
    """The ``LedgerObserver``; one attribute for each metric."""

    def __init__(self, declare: Catalogue) -> None:
        self.seconds = declare.histogram(
            "darkroom_ledger_seconds",
            "Seconds until the ledger of accepted jobs answered or failed, by operation.",
            ("op",),
            SECONDS_BUCKETS,
        )
        self.reachable = declare.gauge(
            "darkroom_ledger_reachable", "1 while accepted jobs can be written into the ledger."
        )
        self.reclaimed = declare.counter(
            "darkroom_jobs_reclaimed_total",
            "Jobs of earlier servers that this one took up from the ledger, by what had kept them "
            "from ending: server_died (it died while they ran) or queued (they waited).",
            ("cause",),
        )
        self.reachable.set(1)
        for cause in CAUSES:
            self.reclaimed.labels(cause)

    def ledger_called(self, op: str, seconds: float) -> None:
        """An operation was answered, or failed, after ``seconds``."""
        self.seconds.labels(op).observe(seconds)

    def set_reachable(self, reachable: bool) -> None:
        """The ledger can be read and written from now on, or not."""
        self.reachable.set(reachable)

    def jobs_reclaimed(self, cause: str, jobs: int) -> None:
        """Jobs that an earlier server accepted are this one's now."""
        self.reclaimed.labels(cause).inc(jobs)
