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
    """One image to draw; ``arrival`` is in seconds after the run begins."""

    index: int
    prompt: str
    steps: int
    guidance_scale: float
    seed: int
    arrival: float = 0.0

    @property
    def settings(self) -> tuple[int, float]:
        """What requests must share to be drawn by one call of a pipeline."""
        return self.steps, self.guidance_scale


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
