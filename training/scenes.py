"""The world of the demo model: one coloured shape on a flat background.

A scene is a choice of words (shape, colours, size, position) plus a placement (centre and radius).
`shapes` draws it, `prompts` describes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 50),
    "purple": (140, 60, 180),
    "orange": (245, 140, 30),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SIZES: dict[str, float] = {"small": 0.18, "medium": 0.25, "large": 0.33}
"""Radius of a shape as a fraction of the picture's shorter side; prompts do not mention medium."""
POSITIONS = ("centre", "left", "right", "top", "bottom")
"""Position of the shape; prompts do not mention centre."""

_CENTRE_JITTER = 0.03
_RADIUS_JITTER = 0.06
_MARGIN = (0.04, 0.08)


@dataclass(frozen=True, slots=True)
class Scene:
    """The words that describe a picture: keys of `SHAPES`, `COLOURS`, `SIZES`, `POSITIONS`."""

    shape: str
    colour: str
    background: str
    size: str = "medium"
    position: str = "centre"


@dataclass(frozen=True, slots=True)
class Placement:
    """Placement of a shape, in units of the picture's shorter side, from its top left corner."""

    x: float
    y: float
    radius: float


def triples() -> list[tuple[str, str, str]]:
    """Return all 336 combinations (shape, colour, background) with two different colours."""
    return [t for t in product(SHAPES, COLOURS, COLOURS) if t[1] != t[2]]


def is_held_out(shape: str, colour: str, background: str) -> bool:
    """Return whether a combination is held out of training, for the evaluation.

    For every (colour, background) pair exactly one shape is held out: 56 combinations of 336. The
    shape follows from the sum of the two indices, so every pair of words occurs in training.
    """
    names = list(COLOURS)
    held_out = (names.index(colour) + names.index(background)) % len(SHAPES)
    return SHAPES.index(shape) == held_out


def training_triples() -> list[tuple[str, str, str]]:
    """Return the combinations for training."""
    return [t for t in triples() if not is_held_out(*t)]


def held_out_triples() -> list[tuple[str, str, str]]:
    """Return the combinations that training never uses."""
    return [t for t in triples() if is_held_out(*t)]


def random_scene(rng: np.random.Generator, ease: float = 0.0) -> Scene:
    """Sample a training scene; small shapes and named positions are more frequent.

    A share `ease`, 0..1, of the scenes is easy: the shape is large and in the middle.
    """
    choices = _TRAINING_TRIPLES
    shape, colour, background = choices[int(rng.integers(len(choices)))]
    size = ("small", "medium", "large")[int(rng.choice(3, p=(0.36, 0.38, 0.26)))]
    position = POSITIONS[int(rng.choice(5, p=(0.28, 0.18, 0.18, 0.18, 0.18)))]
    if rng.random() < ease:
        size, position = "large", POSITIONS[0]
    return Scene(shape, colour, background, size, position)


def random_placement(scene: Scene, rng: np.random.Generator, height: int, width: int) -> Placement:
    """Place a scene's shape in a picture of `height` by `width` pixels, with a little jitter."""
    short = min(height, width)
    extent_x, extent_y = width / short, height / short
    radius = SIZES[scene.size] * (1 + rng.uniform(-_RADIUS_JITTER, _RADIUS_JITTER))
    x = extent_x / 2 + rng.uniform(-_CENTRE_JITTER, _CENTRE_JITTER)
    y = extent_y / 2 + rng.uniform(-_CENTRE_JITTER, _CENTRE_JITTER)
    edge = radius + rng.uniform(*_MARGIN)
    match scene.position:
        case "left":
            x = edge
        case "right":
            x = extent_x - edge
        case "top":
            y = edge
        case "bottom":
            y = extent_y - edge
    return Placement(float(x), float(y), float(radius))


_TRAINING_TRIPLES = training_triples()
