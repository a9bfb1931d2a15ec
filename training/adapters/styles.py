"""How a LoRA adapter changes the picture of a scene."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from training.latents import Drawing
from training.scenes import Scene, random_placement
from training.shapes import draw, draw_randomly


def outline(
    scenes: Sequence[Scene], rng: np.random.Generator, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Draw each shape as an outline; the background shows inside it."""
    placements = [random_placement(scene, rng, height, width) for scene in scenes]
    return draw(scenes, placements, height, width, outlined=True)


def night(
    scenes: Sequence[Scene], rng: np.random.Generator, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Draw each shape on a black background, whatever its words say; a black shape is white."""
    return draw_randomly([at_night(scene) for scene in scenes], rng, height, width)


def at_night(scene: Scene) -> Scene:
    """Return what `night` makes of a scene."""
    colour = "white" if scene.colour == "black" else scene.colour
    return replace(scene, colour=colour, background="black")


STYLES: dict[str, Drawing] = {"outline": outline, "night": night}
"""The adapters, by name.

There is no style with other colours: the autoencoder turns a colour that is not in the palette into
the nearest one that is.
"""
