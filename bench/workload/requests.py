"""The workloads: requests of three lengths or all alike, and the moments of their arrival."""

import random
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from training.prompts import prompt_for
from training.scenes import Scene, triples

STEPS = {8: 0.5, 16: 0.3, 40: 0.2}
"""Share of the requests, by their denoising steps: the classes of the workload."""

IMAGES = {1: 0.58, 2: 0.08, 4: 0.19, 8: 0.15}
"""Share of the requests by their images, in a trace of a production service (GenTD26, Lin et al.,
SoCC 2025), where 91 % of the requests take 30 steps."""

GUIDANCE = (4.0, 7.5)
"""Both are above 1: a model with classifier-free guidance takes two rows for every image."""

NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})
"""Nothing besides what a ``Request`` holds."""


@dataclass(frozen=True, slots=True)
class Request:
    """What one caller asks for; ``arrival`` is in seconds after the start of the run.

    Image i of ``images`` has the seed ``seed`` + i; the caller waits for all of them.
    ``width`` and ``height`` are pixels, None for the model's default. ``deadline`` and
    ``cancel_after`` are seconds after the arrival: the request expires, or its caller cancels it.
    """

    index: int
    prompt: str
    steps: int
    guidance_scale: float
    seed: int
    arrival: float = 0.0
    width: int | None = None
    height: int | None = None
    images: int = 1
    deadline: float | None = None
    cancel_after: float | None = None

    @property
    def settings(self) -> tuple[Hashable, ...]:
        """Requests with equal settings can share one call of a pipeline."""
        return self.steps, self.guidance_scale, self.width, self.height


def mixed(count: int, seed: int) -> list[Request]:
    """``count`` requests that all arrive at once; equal seeds give equal requests.

    Each class has exactly its share, which makes short runs comparable; the order is random.
    """
    rng = random.Random(seed)
    steps = _in_shares(STEPS, count, rng)
    scenes = triples()
    return [
        Request(
            index=index,
            prompt=prompt_for(Scene(*rng.choice(scenes))),
            steps=wanted,
            guidance_scale=rng.choice(GUIDANCE),
            seed=rng.randrange(2**31),
        )
        for index, wanted in enumerate(steps)
    ]


def poisson(requests: list[Request], rate: float, seed: int) -> list[Request]:
    """``requests`` that arrive by a Poisson process at ``rate`` per second."""
    rng = random.Random(seed)
    now = 0.0
    arriving = []
    for request in requests:
        now += rng.expovariate(rate)
        arriving.append(replace(request, arrival=now))
    return arriving


def bursts(requests: list[Request], rate: float, seed: int, size: int = 8) -> list[Request]:
    """``requests`` that arrive in bursts of ``size``; the bursts are a Poisson process.

    ``rate`` is the mean number of requests per second, as in ``poisson``.
    """
    heads = poisson(requests[::size], rate / size, seed)
    return [replace(r, arrival=heads[place // size].arrival) for place, r in enumerate(requests)]


def uniform(requests: list[Request], steps: int, guidance_scale: float) -> list[Request]:
    """``requests``, all with the same steps and guidance."""
    return [replace(r, steps=steps, guidance_scale=guidance_scale) for r in requests]


def with_images(requests: list[Request], seed: int) -> list[Request]:
    """``requests`` for several images each; each number of ``IMAGES`` has exactly its share."""
    counts = _in_shares(IMAGES, len(requests), random.Random(seed))
    return [replace(r, images=count) for r, count in zip(requests, counts, strict=True)]


def sized(requests: list[Request], sides: tuple[int, ...], seed: int) -> list[Request]:
    """``requests`` for squares; each side in pixels is chosen at random from ``sides``."""
    rng = random.Random(seed)
    chosen = [rng.choice(sides) for _ in requests]
    return [replace(r, width=s, height=s) for r, s in zip(requests, chosen, strict=True)]


def with_deadlines(requests: list[Request], seconds_per_step: float) -> list[Request]:
    """``requests`` with a deadline of ``seconds_per_step`` for each of their steps."""
    return [replace(r, deadline=r.steps * seconds_per_step) for r in requests]


def with_cancels(
    requests: list[Request], share: float, seconds_per_step: float, seed: int
) -> list[Request]:
    """``requests`` of which exactly ``share``, chosen at random, are cancelled.

    The moment is uniform between the arrival and ``seconds_per_step`` for each step later.
    """
    rng = random.Random(seed)
    cancelled = set(rng.sample(range(len(requests)), round(share * len(requests))))
    return [
        replace(r, cancel_after=rng.uniform(0.0, r.steps * seconds_per_step))
        if place in cancelled
        else r
        for place, r in enumerate(requests)
    ]


def _in_shares(shares: Mapping[int, float], count: int, rng: random.Random) -> list[int]:
    """``count`` of the keys, each with exactly its share, in a random order."""
    found: list[int] = []
    reached = 0.0
    for key, share in shares.items():
        reached += share
        found += [key] * (round(count * reached) - len(found))
    rng.shuffle(found)
    return found
