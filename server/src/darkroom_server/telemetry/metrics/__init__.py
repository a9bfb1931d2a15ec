"""Every metric of the server, declared once, on a registry of its own.

Labels are bounded: models that the server holds ("unknown" for what is none), outcomes, stages,
classes of sizes and rows, gRPC's methods and codes. Never a prompt, a seed or anything else that a
caller wrote.
"""

from prometheus_client import CollectorRegistry

from darkroom_server.telemetry.metrics.calls import CallMetrics
from darkroom_server.telemetry.metrics.catalogue import Catalogue, Declared
from darkroom_server.telemetry.metrics.engine import EngineMetrics
from darkroom_server.telemetry.metrics.memory import MemoryMetrics
from darkroom_server.telemetry.metrics.requests import RequestMetrics

__all__ = ["Metrics"]


class Metrics:
    """The metrics, by what they tell of, and the ``registry`` that holds them."""

    def __init__(self) -> None:
        self._catalogues: list[Catalogue] = []
        self.registry = CollectorRegistry()
        self.calls = CallMetrics(self._section("gRPC calls"))
        self.requests = RequestMetrics(self._section("Requests and jobs"))
        self.engine = EngineMetrics(self._section("Engine"))
        self.memory = MemoryMetrics(self._section("Memory and devices"))

    @property
    def declared(self) -> dict[str, list[Declared]]:
        """What was declared, by section, in order."""
        return {catalogue.title: catalogue.declared for catalogue in self._catalogues}

    def _section(self, title: str) -> Catalogue:
        self._catalogues.append(Catalogue(title, self.registry))
        return self._catalogues[-1]
