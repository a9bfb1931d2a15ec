"""Every metric of the server, declared once, on its own registry.

The set of label values is bounded: the server's models ("unknown" for any other name), outcomes,
stages, size and row classes, gRPC methods and codes, HTTP routes and statuses. A label never holds
a prompt, a seed or any other text of a caller.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry

from darkroom_server.core.events import Event
from darkroom_server.dispatch import Dispatcher, DispatchEvent, ModelAdded, Observer
from darkroom_server.telemetry.metrics.calls import CallMetrics
from darkroom_server.telemetry.metrics.catalogue import Catalogue, Declared
from darkroom_server.telemetry.metrics.engine import EngineMetrics
from darkroom_server.telemetry.metrics.fleet import FleetMetrics
from darkroom_server.telemetry.metrics.http import HttpMetrics
from darkroom_server.telemetry.metrics.ledger import LedgerMetrics
from darkroom_server.telemetry.metrics.memory import MemoryMetrics
from darkroom_server.telemetry.metrics.models import ModelMetrics
from darkroom_server.telemetry.metrics.process import ProcessMetrics
from darkroom_server.telemetry.metrics.requests import RequestMetrics
from darkroom_server.telemetry.metrics.uploads import UploadMetrics

__all__ = ["Metrics"]


class Metrics(Observer):
    """The metrics by section, and the ``registry`` that holds them.

    Each section declares its metrics and, in ``handlers``, the events that change them.
    ``model_ids``: the configured models, whose series start at zero, as do those of models that are
    found later.
    """

    def __init__(self, model_ids: Iterable[str] = ()) -> None:
        self._catalogues: list[Catalogue] = []
        self.registry = CollectorRegistry()
        self.calls = CallMetrics(self._section("gRPC calls"))
        self.http = HttpMetrics(self._section("HTTP requests"))
        self.requests = RequestMetrics(self._section("Requests and jobs"))
        self.uploads = UploadMetrics(self._section("Images of callers"))
        self.ledger = LedgerMetrics(self._section("Ledger"))
        self.fleet = FleetMetrics(self._section("Fleet"), self.ledger)
        self.engine = EngineMetrics(self._section("Engine"))
        self.models = ModelMetrics(self._section("Models"))
        self.memory = MemoryMetrics(self._section("Memory and devices"))
        self.process = ProcessMetrics(self._section("Serving process"))
        self._handlers: defaultdict[type, list[Any]] = defaultdict(list)
        for section in (self.requests, self.engine, self.models, self.memory):
            for event, handler in section.handlers.items():
                self._handlers[event].append(handler)
        self._handlers[ModelAdded].append(lambda added: self._begin(added.model))
        self._dispatcher: Dispatcher | None = None
        self._models: set[str] = set()
        for model in model_ids:
            self._begin(model)

    def read_jobs(self, dispatcher: Dispatcher) -> None:
        """Read the jobs of each model, also of those that come later, at each scrape."""
        self._dispatcher = dispatcher
        for model in self._models:
            self.requests.read_jobs(model, dispatcher)

    def _begin(self, model: str) -> None:
        """Create the series of a model."""
        self._models.add(model)
        self.requests.begin(model)
        self.engine.begin(model)
        self.models.begin(model)
        if self._dispatcher is not None:
            self.requests.read_jobs(model, self._dispatcher)

    def on_event(self, event: Event | DispatchEvent) -> None:
        """Record ``event`` in the sections that handle its type."""
        for handler in self._handlers.get(type(event), ()):
            handler(event)

    @property
    def declared(self) -> dict[str, list[Declared]]:
        """The declarations by section, in order."""
        return {catalogue.title: catalogue.declared for catalogue in self._catalogues}

    def _section(self, title: str) -> Catalogue:
        self._catalogues.append(Catalogue(title, self.registry))
        return self._catalogues[-1]
