"""How a metric is declared: once, for the registry and for the page."""

from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
)

# They would double the series, and only OpenMetrics scrapers have a use for them.
disable_created_metrics()  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Declared:
    """One metric, as the page shows it; ``buckets`` are a histogram's upper bounds."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


class Catalogue:
    """Makes the metrics of one section on ``registry``, and remembers how they were declared."""

    def __init__(self, title: str, registry: CollectorRegistry) -> None:
        self.title = title
        self.declared: list[Declared] = []
        self._registry = registry

    def counter(self, name: str, help: str, labels: Sequence[str] = ()) -> Counter:
        """A counter; ``name`` ends in "_total"."""
        self.declared.append(Declared(name, "counter", help, tuple(labels)))
        return Counter(name, help, labels, registry=self._registry)

    def gauge(self, name: str, help: str, labels: Sequence[str] = ()) -> Gauge:
        """A gauge."""
        self.declared.append(Declared(name, "gauge", help, tuple(labels)))
        return Gauge(name, help, labels, registry=self._registry)

    def histogram(
        self, name: str, help: str, labels: Sequence[str], buckets: Sequence[float]
    ) -> Histogram:
        """A histogram, with the upper bounds of its buckets in the metric's unit."""
        self.declared.append(Declared(name, "histogram", help, tuple(labels), tuple(buckets)))
        return Histogram(name, help, labels, buckets=buckets, registry=self._registry)

    def info(self, name: str, help: str, labels: Sequence[str]) -> Info:
        """A gauge that is always 1, and says what it knows in ``labels``; "_info" is added."""
        self.declared.append(Declared(f"{name}_info", "gauge", help, tuple(labels)))
        return Info(name, help, registry=self._registry)
