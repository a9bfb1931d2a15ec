"""Metrics of a server that shares its ledger with others."""

from darkroom_server.telemetry.metrics.catalogue import Catalogue
from darkroom_server.telemetry.metrics.ledger import LedgerMetrics

METHODS = ("WatchGeneration", "CancelGeneration", "GetGeneration", "ListGenerations")


class FleetMetrics:
    """The ``FleetObserver``; one attribute for each metric."""

    def __init__(self, declare: Catalogue, ledger: LedgerMetrics) -> None:
        self.queue_depth = declare.gauge(
            "darkroom_fleet_queue_depth",
            "Jobs that wait in the shared ledger for a server with room, as this server last saw.",
        )
        self.servers = declare.gauge(
            "darkroom_fleet_servers",
            "Servers that have the shared ledger open, as this server last saw; 0 without one.",
        )
        self.relayed = declare.counter(
            "darkroom_relayed_calls_total",
            "Calls about a job of another server that this one made for its own callers.",
            ("method",),
        )
        self._ledger = ledger
        for method in METHODS:
            self.relayed.labels(method)

    def fleet_seen(self, queued: int, servers: int) -> None:
        """How many jobs wait in the ledger, and how many servers share it."""
        self.queue_depth.set(queued)
        self.servers.set(servers)

    def jobs_reclaimed(self, cause: str, jobs: int) -> None:
        """Jobs of dead servers are queued again."""
        self._ledger.jobs_reclaimed(cause, jobs)

    def call_relayed(self, method: str) -> None:
        """A call goes to another server."""
        self.relayed.labels(method).inc()
