"""What the demo model's adapters, masks and input images must do, as requests with verdicts.

Every trial has a control: a request that lacks only what the trial is about, and whose picture must
fail the verdict.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from darkroom_client import Control, GenerationRequest
from training.adapters.control import random_mask_placement
from training.adapters.styles import at_night, has_outline
from training.adapters.verdicts import (
    follows,
    is_outlined,
    is_unchanged,
)
from training.evaluate import held_out_scenes
from training.judge import judge
from training.prompts import prompt_for
from training.scenes import COLOURS, SHAPES, Placement, Scene, random_placement
from training.shapes import coverage, draw

SIDE = 128
_MOST = 400
STRENGTH = 0.3
"""Of image to image: low, so that the layout is the input's and not the prompt's."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A request, whether its picture (3, s, s) in 0..255 is right, and the control's request."""

    request: GenerationRequest
    is_right: Callable[[Tensor], bool]
    control: GenerationRequest


def outline(scene: Scene, rng: np.random.Generator) -> Trial:
    """The adapter draws the shape as an outline."""
    plain = _plain(scene, rng)
    return Trial(
        replace(plain, loras={"outline": 1.0}), lambda seen: is_outlined(seen, scene), plain
    )


def night(scene: Scene, rng: np.random.Generator) -> Trial:
    """The adapter makes the background black; shape and colour stay."""
    plain, wanted = _plain(scene, rng), at_night(scene)

    def is_right(picture: Tensor) -> bool:
        verdict = judge(picture, wanted)
        return verdict.background and verdict.colour and verdict.shape

    return Trial(replace(plain, loras={"night": 1.0}), is_right, plain)


def two_loras(scene: Scene, rng: np.random.Generator) -> Trial:
    """Both adapters together; the control has only one."""
    plain, wanted = _plain(scene, rng), at_night(scene)

    def is_right(picture: Tensor) -> bool:
        verdict = judge(picture, wanted, outlined=True)
        return verdict.background and verdict.colour and is_outlined(picture, wanted)

    return Trial(
        replace(plain, loras={"outline": 1.0, "night": 1.0}),
        is_right,
        replace(plain, loras={"outline": 1.0}),
    )


def controlnet(scene: Scene, rng: np.random.Generator) -> Trial:
    """The shape is where the mask image is, and as large; the words say another place."""
    plain = _plain(scene, rng)
    placement = random_mask_placement(rng, SIDE, SIDE)
    mask = coverage(scene.shape, [placement], SIDE, SIDE)[0]

    def is_right(picture: Tensor) -> bool:
        verdict = judge(picture, scene)
        return follows(picture, mask) and verdict.colour and verdict.background

    return Trial(
        replace(plain, controls=[Control("position", as_image(mask.expand(3, -1, -1) * 2 - 1))]),
        is_right,
        plain,
    )


def image_to_image(scene: Scene, rng: np.random.Generator) -> Trial:
    """The layout is that of the input, which no word says; the control replaces all of it."""
    before = replace(scene, position=_pick(rng, ("left", "right", "top", "bottom")))
    placement = random_placement(before, rng, SIDE, SIDE)
    picture = draw([before], [placement], SIDE, SIDE)[0][0]
    mask = coverage(scene.shape, [placement], SIDE, SIDE)[0]
    wanted = Scene(scene.shape, scene.colour, scene.background)
    request = replace(_plain(wanted, rng), image=as_image(picture), strength=STRENGTH)
    return Trial(request, lambda seen: follows(seen, mask), replace(request, strength=1.0))


def inpaint(scene: Scene, rng: np.random.Generator) -> Trial:
    """The shape on the left stays, and the prompt's shape appears in the mask on the right.

    The control has no mask.
    """
    other = _pick(rng, [name for name in COLOURS if name not in (scene.colour, scene.background)])
    kept = Scene(_pick(rng, SHAPES), other, scene.background)
    picture = draw([kept], [Placement(0.24, 0.5, 0.18)], SIDE, SIDE)[0][0]
    box = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    box[SIDE // 4 : -SIDE // 4, SIDE // 2 :] = True
    wanted = Scene(scene.shape, scene.colour, scene.background, "small", "right")
    before = (picture + 1) * 127.5

    def is_right(seen: Tensor) -> bool:
        inside = seen[:, SIDE // 4 : -SIDE // 4, SIDE // 2 :]
        verdict = judge(inside, wanted)
        return is_unchanged(seen, before, ~box) and verdict.shape and verdict.colour

    request = replace(_plain(wanted, rng), image=as_image(picture), strength=1.0)
    return Trial(
        replace(request, mask_image=as_image(box.float().expand(3, -1, -1) * 2 - 1)),
        is_right,
        request,
    )


KINDS: dict[str, Callable[[Scene, np.random.Generator], Trial]] = {
    "outline": outline,
    "night": night,
    "two LoRAs": two_loras,
    "ControlNet": controlnet,
    "image to image": image_to_image,
    "inpaint": inpaint,
}


def trials(kind: str, count: int) -> list[Trial]:
    """Return `count` trials of a kind on held-out scenes, the same ones every time."""
    scenes = [scene for scene in held_out_scenes(_MOST) if _is_judged(kind, scene)]
    return [
        KINDS[kind](scene, np.random.default_rng(number))
        for number, scene in enumerate(scenes[:count])
    ]


def _is_judged(kind: str, scene: Scene) -> bool:
    # Black is what `night` adds, and what it changes.
    if "black" in (scene.colour, scene.background):
        return False
    return kind not in ("outline", "two LoRAs") or has_outline(scene)


def as_image(picture: Tensor) -> PIL.Image.Image:
    """Return a picture (3, h, w) in -1..1 as an image."""
    return PIL.Image.fromarray(
        ((picture + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), "RGB"
    )


def _plain(scene: Scene, rng: np.random.Generator) -> GenerationRequest:
    return GenerationRequest(prompt_for(scene), seed=int(rng.integers(2**31)))


def _pick(rng: np.random.Generator, names: list[str] | tuple[str, ...]) -> str:
    return names[int(rng.integers(len(names)))]
