"""Every metric of the server, declared once, on its own registry.

The set of label values is bounded: the server's models ("unknown" for any other name), outcomes,
stages, size and row classes, gRPC methods and codes. A label never holds a prompt, a seed or any
other text of a caller.
"""

from prometheus_client import CollectorRegistry

from darkroom_server.telemetry.metrics.calls import CallMetrics
from darkroom_server.telemetry.metrics.catalogue import Catalogue, Declared
from darkroom_server.telemetry.metrics.engine import EngineMetrics
from darkroom_server.telemetry.metrics.memory import MemoryMetrics
from darkroom_server.telemetry.metrics.requests import RequestMetrics

__all__ = ["Metrics"]


class Metrics:
    """All metrics by subject, and the ``registry`` that holds them."""

    def __init__(self) -> None:
        self._catalogues: list[Catalogue] = []
        self.registry = CollectorRegistry()
        self.calls = CallMetrics(self._section("gRPC calls"))
        self.requests = RequestMetrics(self._section("Requests and jobs"))
        self.engine = EngineMetrics(self._section("Engine"))
        self.memory = MemoryMetrics(self._section("Memory and devices"))

    @property
    def declared(self) -> dict[str, list[Declared]]:
        """The declarations by section, in order."""
        return {catalogue.title: catalogue.declared for catalogue in self._catalogues}

    def _section(self, title: str) -> Catalogue:
        self._catalogues.append(Catalogue(title, self.registry))
        return self._catalogues[-1]
