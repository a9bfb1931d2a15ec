"""How long requests take alone in a bare ``pipe()``: the yardstick of SLO attainment."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

from bench.inprocess.remote import Remote
from bench.peers.scenarios import Mix, Scenario
from bench.workload.requests import Request

REPEATS = 3
"""Requests of each kind that are measured."""

SAMPLE = 200
"""Requests of a mix among which all of its kinds are."""


def kind_of(request: Request) -> str:
    """Requests of one kind take equally long."""
    size = f"{request.width}×{request.height}" if request.width else "default size"
    return f"{request.steps} steps, {request.images} images, {size}"


def kinds_of(mix: Mix, side: int) -> dict[str, Request]:
    """A request of each kind of ``mix``; ``side`` is the model's default side in pixels."""
    requests = Scenario(mix=mix).requests(SAMPLE, seed=0, capacity=0.0, nominal=0.0, side=side)
    return {kind_of(request): request for request in requests}


def measure_alone(pipe: Remote, mix: Mix, side: int) -> dict[str, float]:
    """Median seconds of a lone request of each kind of ``mix``; ``side`` as in ``kinds_of``."""
    kinds = kinds_of(mix, side)
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(REPEATS):
        for kind, request in kinds.items():
            answers = pipe.serve([replace(request, index=0)], callers=1).answers
            found[kind].append(answers[0].latency)
    return {kind: statistics.median(seconds) for kind, seconds in found.items()}


def alone_seconds(requests: Sequence[Request], measured: Mapping[str, float]) -> list[float]:
    """Seconds of each of ``requests`` alone, as ``measured``, by its index."""
    ordered = sorted(requests, key=lambda request: request.index)
    return [round(measured[kind_of(request)], 5) for request in ordered]
