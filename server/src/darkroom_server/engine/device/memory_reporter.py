"""Emits the engine's memory and its devices' sensors about once a second."""

import threading
from collections.abc import Callable, Iterable

import psutil
import torch

from darkroom_server.core.events import Event, MemoryReport, Sensors
from darkroom_server.engine.device.gpu_sensors import GpuSensors
from darkroom_server.engine.device.memory import status_bytes
from darkroom_server.engine.device.peak_memory import PeakMemoryTracker
from darkroom_server.ipc.channel import ChannelClosed


class MemoryReporter:
    """Reports on ``devices`` from a thread of its own, because the driver may answer slowly.

    The thread reads only statistics that torch keeps on the host. ``peaks`` has the highest peak,
    because it resets torch's own for its measurements.
    """

    INTERVAL_SECONDS = 1.0

    def __init__(
        self,
        devices: Iterable[torch.device],
        peaks: PeakMemoryTracker,
        emit: Callable[[Event], None],
    ) -> None:
        self._sensors = {
            device: GpuSensors(str(torch.cuda.get_device_properties(device).uuid))
            if device.type == "cuda"
            else None
            for device in devices
        }
        self._peaks = peaks
        self._emit = emit
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)

    def start(self) -> None:
        """Start to report."""
        self._thread.start()

    def close(self) -> None:
        """Stop, and wait for the thread."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def report(self) -> None:
        """Emit one report for each device."""
        for device, sensors in self._sensors.items():
            if sensors is None:
                by_kind, reading = self._of_host(), Sensors()
            else:
                by_kind, reading = self._of_gpu(device, sensors), sensors.read()
            rss = status_bytes("VmRSS")
            self._emit(
                MemoryReport(device=str(device), by_kind=by_kind, host_rss=rss, sensors=reading)
            )

    def _run(self) -> None:
        try:
            while not self._closed.is_set():
                self.report()
                self._closed.wait(self.INTERVAL_SECONDS)
        except ChannelClosed:
            return  # The serving process is gone; the main thread ends this process.

    def _of_gpu(self, device: torch.device, sensors: GpuSensors) -> dict[str, int]:
        memory = sensors.memory()
        if memory is None:
            free, total = torch.cuda.mem_get_info(device)
            memory = (total - free, total)
        return {
            "allocated": torch.cuda.memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
            "peak": max(self._peaks.highest, torch.cuda.max_memory_allocated(device)),
            "device_used": memory[0],
            "device_total": memory[1],
        }

    def _of_host(self) -> dict[str, int]:
        system = psutil.virtual_memory()
        rss = status_bytes("VmRSS")
        return {
            "allocated": rss,
            "reserved": rss,
            "peak": max(self._peaks.highest, status_bytes("VmHWM")),
            "device_used": system.total - system.available,
            "device_total": system.total,
        }
