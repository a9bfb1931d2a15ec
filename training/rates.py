"""How training changes as it goes: the learning rate, and how easy the scenes are."""

from __future__ import annotations

import math

_RAMP = 200
_ALL_EASY, _NONE_EASY = 0.15, 0.35


def rate_at(step: int, progress: float) -> float:
    """The learning rate as a share of its peak: a ramp of 200 steps, then half a cosine.

    `progress`, 0..1, is the share of the steps done, or of the time if that ends first.
    """
    return min(step / _RAMP, 1.0) * 0.5 * (1 + math.cos(math.pi * progress))


def ease_at(progress: float) -> float:
    """The share of easy scenes, 0..1: all at first, then fewer, and none from 0.35 on.

    Where a shape may be anywhere and of any size, each word's mean picture is the same blob, so
    for thousands of batches nothing is gained by reading which shape it is. Large and in the
    middle, the shapes differ at any noise, and the denoiser reads the word within hundreds.
    """
    return min(1.0, max(0.0, (_NONE_EASY - progress) / (_NONE_EASY - _ALL_EASY)))
