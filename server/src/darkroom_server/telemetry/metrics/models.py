"""Metrics of the catalogue: where models are, loads and evictions."""

from collections.abc import Callable
from typing import Any

from darkroom_server.core.catalog import ModelState, WeightOrigin
from darkroom_server.core.events import EngineReady
from darkroom_server.core.model_events import ModelInHost, ModelLoad, ModelLoaded
from darkroom_server.dispatch import (
    LoadOutcome,
    ModelEvicted,
    ModelLoadEnded,
    ModelRemoved,
    ModelStateChanged,
    TierBytes,
)
from darkroom_server.telemetry.metrics.catalogue import Catalogue


class ModelMetrics:
    """One attribute per metric."""

    def __init__(self, declare: Catalogue) -> None:
        self.state = declare.gauge(
            "darkroom_model_state",
            "1 for the state of the model, 0 for the others: `available` is loaded when a request "
            "names it, `loading`, `resident` is in the device's memory, `host` in the host's "
            "memory only, `failed` cannot be loaded.",
            ("model", "state"),
        )
        self.loads = declare.counter(
            "darkroom_model_loads_total",
            "Loads of the model: `from` the `disk`, the `host`'s memory or the `hub`; `loaded` or "
            "`failed`. One that is read into the host's memory first counts once for the read, and "
            "once for the copy from there.",
            ("model", "from", "outcome"),
        )
        self.evictions = declare.counter(
            "darkroom_model_evictions_total",
            "Times that the model was unloaded to make room for another.",
            ("model",),
        )
        self.load_seconds = declare.gauge(
            "darkroom_model_load_seconds",
            "Seconds of the last load of the model into memory, `from` the `disk`, the `host`'s "
            "memory or the `hub`.",
            ("model", "from"),
        )
        self.swap_seconds = declare.counter(
            "darkroom_model_swap_seconds_total",
            "Seconds in which engines loaded models beside jobs, or read them into the host's "
            "memory; divided by the time and the engines, the share of time spent swapping.",
        )
        self.tier_bytes = declare.gauge(
            "darkroom_model_tier_bytes",
            "Weights that an engine holds by `tier`: the `device`, or the `host`'s memory. What "
            "models have in common counts once.",
            ("engine", "tier"),
        )
        self.warm_up_seconds = declare.gauge(
            "darkroom_model_warm_up_seconds",
            "Seconds of the last placement, warm-up and profiling of the model; batches of other "
            "models run meanwhile.",
            ("model",),
        )
        self.handlers: dict[type, Callable[[Any], None]] = {
            EngineReady: self.record_ready,
            ModelLoaded: lambda loaded: self.record_load(loaded.load),
            ModelInHost: lambda read: self.record_seconds(read.load),
            ModelLoadEnded: self.record_end,
            ModelEvicted: lambda evicted: self.evictions.labels(evicted.model).inc(),
            ModelStateChanged: self.record_state,
            ModelRemoved: self.remove,
            TierBytes: self.record_tiers,
        }

    def begin(self, model: str) -> None:
        """Create the series of ``model`` at zero."""
        self.evictions.labels(model)
        for outcome in LoadOutcome:
            self.loads.labels(model, WeightOrigin.DISK, outcome)
        for state in ModelState:
            self.state.labels(model, state)

    def remove(self, removed: ModelRemoved) -> None:
        """A model left the catalogue: it is in no state. What was counted stays."""
        for state in ModelState:
            self.state.remove(removed.model, state)

    def record_ready(self, ready: EngineReady) -> None:
        """An engine has loaded the models of its start."""
        for load in ready.loads:
            self.record_load(load)

    def record_load(self, load: ModelLoad) -> None:
        """A model was loaded."""
        self.record_seconds(load)
        self.warm_up_seconds.labels(load.model).set(load.warm_up_seconds)

    def record_seconds(self, load: ModelLoad) -> None:
        """A model was loaded, or read into the host's memory."""
        self.load_seconds.labels(load.model, load.origin).set(load.load_seconds)

    def record_end(self, ended: ModelLoadEnded) -> None:
        """A load has ended."""
        self.loads.labels(ended.model, ended.origin, ended.outcome).inc()
        self.swap_seconds.inc(ended.seconds)

    def record_tiers(self, held: TierBytes) -> None:
        """What an engine holds has changed."""
        for tier, size in held.by_tier.items():
            self.tier_bytes.labels(str(held.engine), tier).set(size)

    def record_state(self, changed: ModelStateChanged) -> None:
        """A model is in another state."""
        for state in ModelState:
            self.state.labels(changed.model, state).set(state is changed.state)
