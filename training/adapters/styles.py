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
    """Draw shapes as outlines, if `has_outline` says so; the background shows inside them."""
    placements = [random_placement(scene, rng, height, width) for scene in scenes]
    pictures, masks = draw(scenes, placements, height, width)
    outlined, contours = draw(scenes, placements, height, width, outlined=True)
    for row, scene in enumerate(scenes):
        if has_outline(scene):
            pictures[row], masks[row] = outlined[row], contours[row]
    return pictures, masks


def has_outline(scene: Scene) -> bool:
    """Return whether `outline` changes a scene.

    A ring is an outline already. A latent covers 8×8 pixels, too many for the inside of a small
    shape.
    """
    return scene.shape != "ring" and scene.size != "small"


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
