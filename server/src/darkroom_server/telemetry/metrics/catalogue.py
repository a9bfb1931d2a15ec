"""Declares each metric once, for the registry and for docs/metrics.md."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    Metric,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

# `_created` series double the number of series, and only OpenMetrics scrapers use them.
disable_created_metrics()  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Declared:
    """One metric as the docs show it; ``buckets`` are a histogram's upper bounds."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


class _ReadCounter(Collector):
    def __init__(self, name: str, help: str, read: Callable[[], float]) -> None:
        self._name, self._help, self._read = name, help, read

    def collect(self) -> Iterable[Metric]:
        """The value now."""
        yield CounterMetricFamily(self._name, self._help, value=self._read())


class Catalogue:
    """Creates the metrics of one section on ``registry`` and records their declarations."""

    def __init__(self, title: str, registry: CollectorRegistry) -> None:
        self.title = title
        self.declared: list[Declared] = []
        self._registry = registry

    def counter(self, name: str, help: str, labels: Sequence[str] = ()) -> Counter:
        """Declare a counter; ``name`` ends in "_total"."""
        self.declared.append(Declared(name, "counter", help, tuple(labels)))
        return Counter(name, help, labels, registry=self._registry)

    def counter_of(self, name: str, help: str, read: Callable[[], float]) -> None:
        """Declare a counter whose value ``read`` returns at each scrape, on any thread."""
        self.declared.append(Declared(name, "counter", help))
        self._registry.register(_ReadCounter(name, help, read))

    def gauge(self, name: str, help: str, labels: Sequence[str] = ()) -> Gauge:
        """Declare a gauge."""
        self.declared.append(Declared(name, "gauge", help, tuple(labels)))
        return Gauge(name, help, labels, registry=self._registry)

    def histogram(
        self, name: str, help: str, labels: Sequence[str], buckets: Sequence[float]
    ) -> Histogram:
        """Declare a histogram; ``buckets`` are upper bounds in the metric's unit."""
        self.declared.append(Declared(name, "histogram", help, tuple(labels), tuple(buckets)))
        return Histogram(name, help, labels, buckets=buckets, registry=self._registry)

    def info(self, name: str, help: str, labels: Sequence[str]) -> Info:
        """Declare a gauge with the constant value 1 and the information in ``labels``.

        The metric's name is ``name`` with "_info" added.
        """
        self.declared.append(Declared(f"{name}_info", "gauge", help, tuple(labels)))
        return Info(name, help, registry=self._registry)
