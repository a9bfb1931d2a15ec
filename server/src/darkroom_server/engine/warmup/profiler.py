"""Readings of time and memory at warm-up."""

import time
from collections.abc import Callable

import torch

from darkroom_server.engine.device.memory import PeakMemory


def peak_bytes(device: torch.device, work: Callable[[], object]) -> int:
    """The peak memory of ``work`` in bytes, above what is in use before it."""
    peak = PeakMemory(device)
    peak.reset()
    work()
    return peak.read()


def seconds_of(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of ``work``, until ``device`` has finished it."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
