"""Schedules of training: the learning rate, and the curriculum from easy scenes on."""

from __future__ import annotations

import math

_RAMP = 200
_ALL_EASY, _NONE_EASY = 0.15, 0.35


def rate_at(step: int, progress: float, ramp: int = _RAMP) -> float:
    """Return the learning rate as a share of its peak: a ramp of `ramp` steps, then half a cosine.

    `progress`, 0..1, is the share of the steps done, or of the time if that ends first.
    """
    return min(step / ramp, 1.0) * 0.5 * (1 + math.cos(math.pi * progress))


def ease_at(progress: float) -> float:
    """Return the share of easy scenes, 0..1: all at first, then fewer, none from 0.35 on.

    If a shape may have any place and size, each word's mean picture is the same blob, and the
    denoiser gains nothing from the word for thousands of batches. Large shapes in the middle differ
    at any noise level, and the denoiser learns the words within hundreds of batches.
    """
    return min(1.0, max(0.0, (_NONE_EASY - progress) / (_NONE_EASY - _ALL_EASY)))
