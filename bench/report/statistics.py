"""Quantiles, and the confidence interval of a median."""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

RESAMPLES = 2000


def quantile(values: Sequence[float], share: float) -> float:
    """The ``share`` quantile (0 to 1) of ``values``, interpolated linearly."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass(frozen=True, slots=True)
class Median:
    """A median and its 95 % confidence interval."""

    value: float
    low: float
    high: float


def bootstrap_median(values: Sequence[float], seed: int = 0) -> Median:
    """The median of ``values`` with its percentile bootstrap interval (Efron 1979)."""
    rng = random.Random(seed)
    medians = [statistics.median(rng.choices(values, k=len(values))) for _ in range(RESAMPLES)]
    return Median(statistics.median(values), quantile(medians, 0.025), quantile(medians, 0.975))
