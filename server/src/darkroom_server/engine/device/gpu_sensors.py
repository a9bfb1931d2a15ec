"""What NVIDIA's driver says of a GPU, by NVML; nothing of it touches CUDA."""

from collections.abc import Callable
from typing import Any

import structlog

from darkroom_server.core.events import Sensors

log = structlog.get_logger(__name__)


class GpuSensors:
    """Reads one GPU, named by its UUID: CUDA and NVML number the devices differently.

    What the driver does not know is None; a machine without NVML knows nothing.
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
            log.warning("the driver tells nothing of the GPU", uuid=name, why=str(error))

    def read(self) -> Sensors:
        """What the device does now."""
        if self._handle is None:
            return Sensors()
        nvml, handle = self._nvml, self._handle
        busy = self._ask(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        milliwatts = self._ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        celsius = self._ask(
            lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
        )
        return Sensors(
            utilisation=None if busy is None else busy / 100,
            power_watts=None if milliwatts is None else milliwatts / 1000,
            temperature_celsius=celsius,
        )

    def memory(self) -> tuple[int, int] | None:
        """Bytes used and in all, whoever uses them; None where the driver does not tell."""
        if self._handle is None:
            return None
        nvml, handle = self._nvml, self._handle
        try:
            found = nvml.nvmlDeviceGetMemoryInfo(handle)
        except nvml.NVMLError:
            return None
        return int(found.used), int(found.total)

    def _ask(self, question: Callable[[], float]) -> float | None:
        try:
            return float(question())
        except self._nvml.NVMLError:
            return None  # Not every GPU, and no slice of one, has every sensor.


def _nvml() -> Any:
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml
