"""Metrics of memory by holder, and of the device."""

from collections.abc import Callable
from typing import Any

import psutil

from darkroom_server.core.events import (
    AdapterEvicted,
    AdapterLoaded,
    EngineReady,
    MemoryReport,
    PeakMeasured,
)
from darkroom_server.core.metric_labels import rows_class, size_class
from darkroom_server.core.model_events import ModelLoad, ModelLoaded, ModelUnloaded
from darkroom_server.dispatch import AdapterMemory
from darkroom_server.telemetry.metrics.catalogue import Catalogue
from darkroom_server.telemetry.metrics.engine import ROWS_HELP

SIZE_HELP = "`size_class` is the edge in pixels of a square that holds the image"


class MemoryMetrics:
    """One attribute per metric."""

    def __init__(self, declare: Catalogue) -> None:
        self.device = declare.gauge(
            "darkroom_gpu_memory_bytes",
            "Memory of the engine's device by kind: `allocated` and `reserved` by torch, `peak` of "
            "`allocated`, and the driver's `device_used` and `device_total`. On a CPU the first "
            "three are the engine's resident memory, the others the machine's.",
            ("device", "kind"),
        )
        self.model = declare.gauge(
            "darkroom_model_memory_bytes",
            "Weights of a model, by component: unet, vae, text_encoder, safety_checker; and "
            "`graphs`, which `--preset max` records on a GPU before the model is ready. 0 after it "
            "was unloaded.",
            ("model", "component"),
        )
        self.adapter = declare.gauge(
            "darkroom_adapter_bytes",
            "Weights of a LoRA or a ControlNet in the memory of engines, 0 after its eviction.",
            ("model", "adapter"),
        )
        self.adapter_loads = declare.counter(
            "darkroom_adapter_loads_total",
            "LoRA adapters and ControlNets read into an engine's memory.",
            ("model", "adapter"),
        )
        self.adapter_evictions = declare.counter(
            "darkroom_adapter_evictions_total",
            "LoRA adapters evicted from an engine's memory to make room for others.",
            ("model", "adapter"),
        )
        self.pass_peak = declare.gauge(
            "darkroom_peak_memory_bytes",
            "Peak memory of a batch above what was in use before it: its activations. "
            "Measured once a second for each class, on a CPU once a minute. "
            f"{SIZE_HELP}; {ROWS_HELP}.",
            ("model", "size_class", "rows"),
        )
        self.decode_peak = declare.gauge(
            "darkroom_decode_peak_memory_bytes",
            "Peak memory of the decode of one image above what was in use before it. "
            "Measured as often as batches. "
            f"{SIZE_HELP}.",
            ("model", "size_class"),
        )
        self.host = declare.gauge(
            "darkroom_host_memory_bytes",
            "Resident memory of each process of the server; `device` is set for an engine.",
            ("process", "device"),
        )
        # Read at each scrape, so nothing polls it.
        own = psutil.Process()
        self.host.labels("server", "").set_function(lambda: own.memory_info().rss)
        self.utilisation = declare.gauge(
            "darkroom_gpu_utilisation_ratio",
            "Share of the last sampling period in which the device was busy, if NVML reports it.",
            ("device",),
        )
        self.power = declare.gauge(
            "darkroom_gpu_power_watts", "Power of the device, if NVML reports it.", ("device",)
        )
        self.temperature = declare.gauge(
            "darkroom_gpu_temperature_celsius",
            "Temperature of the device, if NVML reports it.",
            ("device",),
        )
        # The highest so far, by model and classes.
        self._peaks: dict[tuple[str, ...], int] = {}
        self._components: dict[str, tuple[str, ...]] = {}
        self.handlers: dict[type, Callable[[Any], None]] = {
            EngineReady: self.record_weights,
            ModelLoaded: lambda loaded: self.record_load(loaded.load),
            ModelUnloaded: self.record_unload,
            PeakMeasured: self.record_peak,
            MemoryReport: self.record_report,
            AdapterLoaded: self.record_adapter_load,
            AdapterEvicted: self.record_adapter_eviction,
            AdapterMemory: self.record_adapter_memory,
        }

    def record_weights(self, ready: EngineReady) -> None:
        """An engine has loaded its models."""
        for load in ready.loads:
            self.record_load(load)

    def record_load(self, load: ModelLoad) -> None:
        """A model is in memory."""
        self._components[load.model] = tuple(load.bytes_by_component)
        for component, size in load.bytes_by_component.items():
            self.model.labels(load.model, component).set(size)

    def record_unload(self, unloaded: ModelUnloaded) -> None:
        """A model is in memory no more."""
        for component in self._components.get(unloaded.model, ()):
            self.model.labels(unloaded.model, component).set(0)

    def record_adapter_load(self, loaded: AdapterLoaded) -> None:
        """An engine has read an adapter."""
        self.adapter_loads.labels(loaded.model, loaded.adapter).inc()

    def record_adapter_eviction(self, evicted: AdapterEvicted) -> None:
        """An engine has evicted an adapter."""
        self.adapter_evictions.labels(evicted.model, evicted.adapter).inc()

    def record_adapter_memory(self, memory: AdapterMemory) -> None:
        """The bytes of an adapter, in all engines."""
        self.adapter.labels(memory.model, memory.adapter).set(memory.bytes)

    def record_peak(self, peak: PeakMeasured) -> None:
        """The memory of a batch or a decode was measured; the highest counts."""
        key: tuple[str, ...] = (peak.model, size_class(peak.width, peak.height))
        gauge = self.decode_peak
        if peak.rows:
            key, gauge = (*key, rows_class(peak.rows)), self.pass_peak
        self._peaks[key] = max(peak.peak_bytes, self._peaks.get(key, 0))
        gauge.labels(*key).set(self._peaks[key])

    def record_report(self, report: MemoryReport) -> None:
        """An engine's memory, about once a second."""
        device, sensors = report.device, report.sensors
        for kind, size in report.by_kind.items():
            self.device.labels(device, kind).set(size)
        self.host.labels("engine", device).set(report.host_rss)
        for gauge, value in (
            (self.utilisation, sensors.utilisation),
            (self.power, sensors.power_watts),
            (self.temperature, sensors.temperature_celsius),
        ):
            if value is not None:
                gauge.labels(device).set(value)
