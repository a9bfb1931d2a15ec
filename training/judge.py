"""Judges one picture against the scene it should show, by the masks of the drawing code."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.scenes import COLOURS, POSITIONS, SHAPES, SIZES, Placement, Scene
from training.shapes import coverage

LEAST_OVERLAP = 0.5
"""Intersection over union below which no shape is recognized."""

CRISP_OVERLAP = 0.8
"""Intersection over union from which a shape counts as crisp."""

_CORNER = 6
_GRID = 64


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which criteria a picture meets; `overlap` is the best intersection over union, 0..1.

    `crisp`: the shape is right, and its outline is sharp and undistorted.
    """

    background: bool
    colour: bool
    shape: bool
    crisp: bool
    size: bool
    position: bool
    overlap: float
    seen: Scene


@dataclass(frozen=True, slots=True)
class Seen:
    """The object of a square picture (3, s, s) in 0..255, and its background.

    `ground` is the mean colour (3,) of the four corners. `mask` (s, s) is 1 at the object's own
    colour, 0 at the background's, and in between if the object covers a part of the pixel. `colour`
    is the median (3,) of the object's inner pixels.
    """

    ground: Tensor
    mask: Tensor
    colour: Tensor


def look_at(picture: Tensor) -> Seen | None:
    """Find what differs from the corners of a square picture (3, s, s) in 0..255.

    The object is what lies more than halfway from the background's colour to the farthest colours.
    Returns None for a flat picture.
    """
    ground = torch.stack(_corners(picture)).mean(0)
    distance = (picture - ground.view(3, 1, 1)).norm(dim=0)
    far = distance.flatten().quantile(0.985)
    if far < 1:
        return None
    inner = distance > 0.8 * far
    # Normalised: a pixel that the object covers by half gives one half.
    mask = (distance / far).clamp(0, 1)
    return Seen(ground, mask, picture[:, inner].median(dim=1).values)


def judge(picture: Tensor, scene: Scene, outlined: bool = False) -> Verdict:
    """Compare a square picture (3, s, s) in 0..255 with its scene, drawn filled or as an outline.

    The background must be right in all four corners. The object's shape, size and place are those
    of the template that overlaps it best.
    """
    names = [nearest_colour(corner) for corner in _corners(picture)]
    background = set(names) == {scene.background}
    seen = look_at(picture)
    if seen is None:
        flat = Scene("circle", names[0], names[0])
        return Verdict(background, False, False, False, False, False, 0.0, flat)
    shape, overlap, placement = best_fit(seen.mask, outlined)
    size = min(SIZES, key=lambda name: abs(SIZES[name] - placement.radius))
    colour = nearest_colour(seen.colour)
    found = Scene(shape, colour, names[0], size, _position(placement))
    right = shape == scene.shape and overlap >= LEAST_OVERLAP
    return Verdict(
        background=background,
        colour=colour == scene.colour,
        shape=right,
        crisp=right and overlap >= CRISP_OVERLAP,
        size=size == scene.size,
        position=found.position == scene.position,
        overlap=overlap,
        seen=found,
    )


def _corners(picture: Tensor) -> list[Tensor]:
    return [
        picture[:, rows, columns].flatten(1).mean(1)
        for rows in (slice(_CORNER), slice(-_CORNER, None))
        for columns in (slice(_CORNER), slice(-_CORNER, None))
    ]


def nearest_colour(rgb: Tensor) -> str:
    """Return the name of the palette colour nearest to an RGB triple in 0..255."""
    table = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    return list(COLOURS)[int((table - rgb.float()).norm(dim=1).argmin())]


def best_fit(mask: Tensor, outlined: bool = False) -> tuple[str, float, Placement]:
    """Return the shape that fits a square mask in 0..1 best, its overlap and its placement."""
    fits = {name: fit(name, mask, outlined) for name in SHAPES}
    shape = max(fits, key=lambda name: fits[name][0])
    return shape, *fits[shape]


def fit(shape: str, mask: Tensor, outlined: bool = False) -> tuple[float, Placement]:
    """Fit a shape, or its outline, to a square mask in 0..1; return the best overlap and placement.

    The first guess matches area and centre of mass; three local searches refine it.
    """
    side = min(_GRID, mask.shape[-1])
    mask = torch.nn.functional.adaptive_avg_pool2d(mask[None], side)[0]
    area, x, y = _moments(mask)
    unit = coverage(shape, [Placement(0.5, 0.5, 0.3)], side, side, outlined)[0]
    unit_area, unit_x, unit_y = _moments(unit)
    radius = 0.3 * (area / unit_area) ** 0.5
    best = (
        0.0,
        Placement(x - (unit_x - 0.5) * radius / 0.3, y - (unit_y - 0.5) * radius / 0.3, radius),
    )
    for reach in (0.1, 0.05, 0.02):
        centre = best[1]
        step = reach * radius
        tries = [
            Placement(centre.x + i * step, centre.y + j * step, centre.radius + k * step)
            for i in (-1, 0, 1)
            for j in (-1, 0, 1)
            for k in (-1, 0, 1)
        ]
        templates = coverage(shape, tries, side, side, outlined)
        shared = torch.minimum(templates, mask).sum((1, 2))
        joined = torch.maximum(templates, mask).sum((1, 2))
        overlaps = shared / joined
        winner = int(overlaps.argmax())
        if overlaps[winner].item() > best[0]:
            best = (overlaps[winner].item(), tries[winner])
    return best


def _moments(mask: Tensor) -> tuple[float, float, float]:
    """Return area and centre of mass of a square mask, in units of its side."""
    side = mask.shape[-1]
    along = (torch.arange(side) + 0.5) / side
    area = mask.mean().item()
    x = (mask.mean(0) * along).mean().item() / area
    y = (mask.mean(1) * along).mean().item() / area
    return area, x, y


def _position(placement: Placement) -> str:
    """Return the entry of `POSITIONS` that matches a placement."""
    dx, dy = placement.x - 0.5, placement.y - 0.5
    # A large shape at an edge is off-centre by little more than 0.08; the centre's jitter is 0.03.
    if max(abs(dx), abs(dy)) < 0.055:
        return POSITIONS[0]
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "top" if dy < 0 else "bottom"
