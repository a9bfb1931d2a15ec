"""Judges what an adapter, a mask or an input image does to one picture."""

from __future__ import annotations

import torch
from torch import Tensor

from training.judge import LEAST_OVERLAP, best_fit, look_at
from training.scenes import Scene
from training.shapes import coverage

FOLLOWED = 0.7
"""Intersection over union from which an object is where a mask is, and of its size."""

UNCHANGED = 2.5
"""The greatest mean difference, in levels of 0..255, that an autoencoder makes."""

_HOLLOW = 0.2
_DRAWN = 0.7


def is_outlined(picture: Tensor, scene: Scene) -> bool:
    """Return whether a picture (3, s, s) in 0..255 shows the scene's shape as an outline.

    The inside of the shape must be background, its contour must not.
    """
    seen = look_at(picture)
    if seen is None:
        return False
    shape, overlap, placement = best_fit(seen.mask, outlined=True)
    side = picture.shape[-1]
    contour = coverage(shape, [placement], side, side, outlined=True)[0]
    inside = (coverage(shape, [placement], side, side)[0] > 0.9) & (contour < 0.1)
    covered = (seen.mask > 0.5).float()
    return (
        shape == scene.shape
        and overlap >= LEAST_OVERLAP
        and covered[contour > 0.9].mean().item() >= _DRAWN
        and covered[inside].mean().item() <= _HOLLOW
    )


def follows(picture: Tensor, mask: Tensor) -> bool:
    """Return whether the object of a picture (3, s, s) is where `mask` (s, s) in 0..1 is."""
    return mask_overlap(picture, mask) >= FOLLOWED


def mask_overlap(picture: Tensor, mask: Tensor) -> float:
    """Return the intersection over union of a picture's object and `mask`, 0..1."""
    seen = look_at(picture)
    if seen is None:
        return 0.0
    shared = torch.minimum(seen.mask, mask).sum() / torch.maximum(seen.mask, mask).sum()
    return shared.item()


def is_unchanged(picture: Tensor, before: Tensor, where: Tensor) -> bool:
    """Return whether two pictures (3, s, s) are equal within rounding in the pixels `where`."""
    return (picture - before).abs()[:, where].mean().item() <= UNCHANGED
