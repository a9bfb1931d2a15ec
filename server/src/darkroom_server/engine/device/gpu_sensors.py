"""Utilisation, power, temperature and memory of a GPU, read by NVML without touching CUDA."""

from collections.abc import Callable
from typing import Any

import structlog

from darkroom_server.core.events import Sensors

log = structlog.get_logger(__name__)


class GpuSensors:
    """Reads one GPU, identified by its UUID: CUDA and NVML number the devices differently.

    A value that the driver does not have is None; without NVML all values are None.
    """

    def __init__(self, uuid: str, nvml: Any = None) -> None:
        self._handle: Any = None
        self._nvml = nvml or _nvml()
        if self._nvml is None:
            return
        name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        try:
            self._nvml.nvmlInit()
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(name)
        except self._nvml.NVMLError as error:
            log.warning("NVML has no data for the GPU", uuid=name, why=str(error))

    def read(self) -> Sensors:
        """The current values of the sensors."""
        if self._handle is None:
            return Sensors()
        nvml, handle = self._nvml, self._handle
        busy = self._query(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        milliwatts = self._query(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        celsius = self._query(
            lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
        )
        return Sensors(
            utilisation=None if busy is None else busy / 100,
            power_watts=None if milliwatts is None else milliwatts / 1000,
            temperature_celsius=celsius,
        )

    def memory(self) -> tuple[int, int] | None:
        """Bytes used by all processes, and in total; None if the driver does not have them."""
        if self._handle is None:
            return None
        nvml, handle = self._nvml, self._handle
        try:
            found = nvml.nvmlDeviceGetMemoryInfo(handle)
        except nvml.NVMLError:
            return None
        return int(found.used), int(found.total)

    def _query(self, read: Callable[[], float]) -> float | None:
        try:
            return float(read())
        except self._nvml.NVMLError:
            return None  # Some GPUs lack sensors, and so does every MIG slice.


def _nvml() -> Any:
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml
