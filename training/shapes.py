"""Draws scenes: signed distances to the six shapes, turned into anti-aliased pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from training.scenes import COLOURS, Placement, Scene, random_placement

Distance = Callable[[Tensor, Tensor], Tensor]
"""Signed distance, negative inside, of points (x right, y down) to a shape of radius 1."""

STROKE = 0.35
"""Width of an outline in units of the shape's radius; its middle is the shape's edge."""


def _polygon(vertices: Sequence[tuple[float, float]]) -> Distance:
    """Exact distance to a polygon (after Inigo Quilez, "2D distance functions")."""

    def distance(x: Tensor, y: Tensor) -> Tensor:
        nearest = torch.full_like(x, torch.inf)
        inside = torch.ones_like(x)
        for (ax, ay), (bx, by) in zip(vertices, (*vertices[1:], vertices[0]), strict=True):
            ex, ey = bx - ax, by - ay
            wx, wy = x - ax, y - ay
            along = ((wx * ex + wy * ey) / (ex * ex + ey * ey)).clamp(0, 1)
            nearest = torch.minimum(nearest, (wx - ex * along) ** 2 + (wy - ey * along) ** 2)
            crosses = ((y >= ay) != (y >= by)) & ((ex * wy > ey * wx) == (by > ay))
            inside = torch.where(crosses, -inside, inside)
        return inside * nearest.sqrt()

    return distance


def _star(points: int, outer: float, inner: float) -> Distance:
    corners = []
    for k in range(2 * points):
        length, angle = (inner if k % 2 else outer), math.pi * k / points
        corners.append((length * math.sin(angle), -length * math.cos(angle)))
    return _polygon(corners)


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.95


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.75).abs() - 0.25


def _heart(x: Tensor, y: Tensor) -> Tensor:
    """Exact distance to a heart (after Inigo Quilez, "2D distance functions")."""
    scale = 1.75
    px, py = x.abs() / scale, 0.55 - y / scale
    lobe = torch.hypot(px - 0.25, py - 0.75) - math.sqrt(2) / 4
    half = (px + py).clamp(min=0) / 2
    cleft = px**2 + (py - 1) ** 2
    flank = (px - half) ** 2 + (py - half) ** 2
    body = torch.minimum(cleft, flank).sqrt() * torch.sign(px - py)
    return torch.where(px + py > 1, lobe, body) * scale


DISTANCES: dict[str, Distance] = {
    "circle": _circle,
    "square": _polygon([(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)]),
    "triangle": _polygon([(0.0, -0.95), (1.05, 0.85), (-1.05, 0.85)]),
    "star": _star(5, 1.1, 0.5),
    "heart": _heart,
    "ring": _ring,
}


def coverage(
    shape: str,
    placements: Sequence[Placement],
    height: int,
    width: int,
    outlined: bool = False,
) -> Tensor:
    """Return the share of each pixel that a shape, or its outline, covers.

    A float tensor (len(placements), height, width) in 0..1. The distance to the edge, in pixels,
    becomes a ramp one pixel wide, as supersampling gives along a straight edge.
    """
    short = min(height, width)
    table = torch.tensor([(p.x, p.y, p.radius) for p in placements]).view(-1, 3, 1, 1)
    x = (torch.arange(width) + 0.5).view(1, 1, width) / short
    y = (torch.arange(height) + 0.5).view(1, height, 1) / short
    radius = table[:, 2]
    px, py = torch.broadcast_tensors((x - table[:, 0]) / radius, (y - table[:, 1]) / radius)
    distance = DISTANCES[shape](px, py)
    if outlined:
        distance = distance.abs() - STROKE / 2
    return (0.5 - distance * radius * short).clamp(0, 1)


def draw(
    scenes: Sequence[Scene],
    placements: Sequence[Placement],
    height: int,
    width: int,
    outlined: bool = False,
) -> tuple[Tensor, Tensor]:
    """Draw scenes, the shapes filled or as outlines.

    Returns pictures (n, 3, height, width) in -1..1, and masks (n, height, width) in 0..1.
    """
    masks = torch.empty(len(scenes), height, width)
    for shape in DISTANCES:
        rows = [i for i, scene in enumerate(scenes) if scene.shape == shape]
        if rows:
            placed = [placements[i] for i in rows]
            masks[rows] = coverage(shape, placed, height, width, outlined)
    colour = palette([s.colour for s in scenes]).view(-1, 3, 1, 1)
    ground = palette([s.background for s in scenes]).view(-1, 3, 1, 1)
    return torch.lerp(ground, colour, masks.unsqueeze(1)), masks


def draw_randomly(
    scenes: Sequence[Scene], rng: np.random.Generator, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Draw scenes at random placements; returns what `draw` returns."""
    return draw(scenes, [random_placement(s, rng, height, width) for s in scenes], height, width)


def palette(names: Sequence[str]) -> Tensor:
    """Return the named colours as (n, 3) in -1..1."""
    return torch.tensor([COLOURS[name] for name in names]) / 127.5 - 1
