"""The learning rate's course, the same for both trainings."""

from __future__ import annotations

import math

_RAMP = 200


def rate_at(step: int, progress: float) -> float:
    """The learning rate as a share of its peak: a ramp of 200 steps, then half a cosine.

    `progress`, 0..1, is the share of the steps done, or of the time if that ends first.
    """
    return min(step / _RAMP, 1.0) * 0.5 * (1 + math.cos(math.pi * progress))
