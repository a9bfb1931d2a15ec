"""Tells the engine's memory, and what its devices do, about once a second."""

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
    """Reports on ``devices`` from a thread of its own: the driver may take its time to answer.

    Only statistics are read there, which torch keeps on the host. ``peaks`` knows the highest
    peak, which it resets in torch for its own measurements.
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
        """Begin to report."""
        self._thread.start()

    def close(self) -> None:
        """Report no more."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def report(self) -> None:
        """Tell once."""
        for device, sensors in self._sensors.items():
            if sensors is None:
                by_kind, told = self._of_host(), Sensors()
            else:
                by_kind, told = self._of_gpu(device, sensors), sensors.read()
            rss = status_bytes("VmRSS")
            self._emit(
                MemoryReport(device=str(device), by_kind=by_kind, host_rss=rss, sensors=told)
            )

    def _run(self) -> None:
        try:
            while not self._closed.is_set():
                self.report()
                self._closed.wait(self.INTERVAL_SECONDS)
        except ChannelClosed:
            return  # The serving process is gone; the engine's main thread ends this one's.

    def _of_gpu(self, device: torch.device, sensors: GpuSensors) -> dict[str, int]:
        told = sensors.memory()
        if told is None:
            free, total = torch.cuda.mem_get_info(device)
            told = (total - free, total)
        return {
            "allocated": torch.cuda.memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
            "peak": max(self._peaks.highest, torch.cuda.max_memory_allocated(device)),
            "device_used": told[0],
            "device_total": told[1],
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
