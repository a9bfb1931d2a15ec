"""What the machine can do at best: products, copies, launches."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from bench.gpu.forward import seconds_of
from bench.gpu.phases import Figures, Plan
from darkroom_server.engine.device.gpu_sensors import GpuSensors

LAUNCHES = 1000
"""Kernels in a row, of which one is timed."""


def machine(plan: Plan) -> Iterator[Figures]:
    """The GPU, and the ceilings of what a model does on it, each by the simplest code."""
    device = plan.torch_device
    yield _facts(device)
    dtype = torch.float16
    first, second = (torch.randn((plan.side, plan.side), device=device).to(dtype) for _ in range(2))
    seconds = seconds_of(lambda: first @ second, plan.repeats)
    yield {"matmul_tflops": 2 * plan.side**3 / seconds / 1e12}
    source = torch.zeros(plan.copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), plan.repeats)
    # Each byte is read and written.
    yield {"device_copy_gb_per_second": 2 * plan.copied_bytes / seconds / 1e9}
    on_host = torch.zeros(plan.copied_bytes // 4, dtype=torch.uint8)
    if device.type == "cuda":
        on_host = on_host.pin_memory()
    part = target[: len(on_host)]
    seconds = seconds_of(lambda: part.copy_(on_host, non_blocking=True), plan.repeats)
    yield {"host_to_device_gb_per_second": len(on_host) / seconds / 1e9}
    yield {"launch_microseconds": seconds_of(_launches(device), plan.repeats) / LAUNCHES * 1e6}


def _facts(device: torch.device) -> Figures:
    if device.type != "cuda":
        return {"device": str(device)}
    properties: Any = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    sensors = GpuSensors(str(properties.uuid)).read()
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "free_bytes": free,
        "total_bytes": total,
        "sensors": asdict(sensors),
    }


def _launches(device: torch.device) -> Callable[[], None]:
    few = torch.zeros(16, device=device)

    def launch() -> None:
        for _ in range(LAUNCHES):
            few.add_(1.0)

    return launch
