"""The mixed workload that every contender gets: who asks for what, and when."""

import random
from dataclasses import dataclass, replace

from training.prompts import prompt_for
from training.scenes import Scene, triples

STEPS = {8: 0.5, 16: 0.3, 40: 0.2}
"""The classes of requests by their denoising steps, and each one's share."""

GUIDANCE = (4.0, 7.5)
"""Both above 1: every image takes two rows of a pass."""


@dataclass(frozen=True, slots=True)
class Request:
    """One image to draw; ``arrival`` is in seconds after the run begins.

    ``width`` and ``height`` are pixels, None for the model's own. ``deadline`` and
    ``cancel_after`` are seconds after the arrival: from then on the image is worth nothing, or its
    caller goes away.
    """

    index: int
    prompt: str
    steps: int
    guidance_scale: float
    seed: int
    arrival: float = 0.0
    width: int | None = None
    height: int | None = None
    deadline: float | None = None
    cancel_after: float | None = None

    @property
    def settings(self) -> tuple[int, float, int | None, int | None]:
        """What requests must share to be drawn by one call of a pipeline."""
        return self.steps, self.guidance_scale, self.width, self.height


def mixed(count: int, seed: int) -> list[Request]:
    """``count`` requests, the same ones for the same ``seed``, all there at once.

    The classes have exactly their shares, so that runs of few requests compare; their order is
    drawn by lot.
    """
    draw = random.Random(seed)
    steps: list[int] = []
    reached = 0.0
    for wanted, share in STEPS.items():
        reached += share
        steps += [wanted] * (round(count * reached) - len(steps))
    draw.shuffle(steps)
    scenes = triples()
    return [
        Request(
            index=index,
            prompt=prompt_for(Scene(*draw.choice(scenes))),
            steps=wanted,
            guidance_scale=draw.choice(GUIDANCE),
            seed=draw.randrange(2**31),
        )
        for index, wanted in enumerate(steps)
    ]


def poisson(requests: list[Request], rate: float, seed: int) -> list[Request]:
    """``requests`` arriving by a Poisson process of ``rate`` a second."""
    draw = random.Random(seed)
    now = 0.0
    arriving = []
    for request in requests:
        now += draw.expovariate(rate)
        arriving.append(replace(request, arrival=now))
    return arriving


def bursts(requests: list[Request], rate: float, seed: int, size: int = 8) -> list[Request]:
    """``requests`` arriving ``size`` at once, the bursts by a Poisson process.

    ``rate`` is the mean of single arrivals a second, as in ``poisson``.
    """
    heads = poisson(requests[::size], rate / size, seed)
    return [replace(r, arrival=heads[place // size].arrival) for place, r in enumerate(requests)]


def uniform(requests: list[Request], steps: int, guidance_scale: float) -> list[Request]:
    """``requests`` that all ask for the same steps and guidance."""
    return [replace(r, steps=steps, guidance_scale=guidance_scale) for r in requests]


def sized(requests: list[Request], sides: tuple[int, ...], seed: int) -> list[Request]:
    """``requests`` for squares, each of a side of ``sides`` that is drawn by lot."""
    draw = random.Random(seed)
    chosen = [draw.choice(sides) for _ in requests]
    return [replace(r, width=s, height=s) for r, s in zip(requests, chosen, strict=True)]


def with_deadlines(requests: list[Request], seconds_per_step: float) -> list[Request]:
    """``requests`` that are worth something for so many seconds a step of theirs."""
    return [replace(r, deadline=r.steps * seconds_per_step) for r in requests]


def with_cancels(
    requests: list[Request], share: float, seconds_per_step: float, seed: int
) -> list[Request]:
    """``requests`` of which exactly ``share``, drawn by lot, lose their callers.

    Each of them does at a moment between its arrival and ``seconds_per_step`` for each step later.
    """
    draw = random.Random(seed)
    leaving = set(draw.sample(range(len(requests)), round(share * len(requests))))
    return [
        replace(r, cancel_after=draw.uniform(0.0, r.steps * seconds_per_step))
        if place in leaving
        else r
        for place, r in enumerate(requests)
    ]
