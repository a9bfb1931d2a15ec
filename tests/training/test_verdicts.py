from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from training.adapters.control import draw_anywhere
from training.adapters.styles import STYLES, has_outline
from training.adapters.trials import KINDS, trials
from training.adapters.verdicts import follows, is_outlined, is_unchanged
from training.evaluate import held_out_scenes
from training.judge import judge
from training.latents import Drawing
from training.scenes import SHAPES, Scene, is_held_out
from training.shapes import draw_randomly

SCENES = [Scene(shape, "red", "blue", size) for shape in SHAPES for size in ("medium", "large")]
OUTLINED = [scene for scene in SCENES if has_outline(scene)]


def drawn(drawing: Drawing, scenes: Sequence[Scene] = SCENES) -> tuple[Tensor, Tensor]:
    """Pictures in 0..255, and masks."""
    pictures, masks = drawing(scenes, np.random.default_rng(3), 128, 128)
    return (pictures + 1) * 127.5, masks


def test_outlines_are_recognized_and_filled_shapes_are_not() -> None:
    outlined, _ = drawn(STYLES["outline"], OUTLINED)
    filled, _ = drawn(draw_randomly, OUTLINED)
    assert all(is_outlined(p, s) for p, s in zip(outlined, OUTLINED, strict=True))
    assert not any(is_outlined(p, s) for p, s in zip(filled, OUTLINED, strict=True))


def test_rings_and_small_shapes_stay_as_they_are() -> None:
    scenes = [Scene("ring", "red", "blue", "large"), Scene("heart", "red", "blue", "small")]
    outlined, _ = drawn(STYLES["outline"], scenes)
    filled, _ = drawn(draw_randomly, scenes)
    assert torch.equal(outlined, filled)


def test_an_outline_of_another_shape_is_wrong() -> None:
    outlined, _ = drawn(STYLES["outline"], OUTLINED[:4])
    other = Scene("star", "red", "blue")
    assert not any(is_outlined(picture, other) for picture in outlined)


def test_night_changes_the_background_only() -> None:
    pictures, _ = drawn(STYLES["night"], SCENES[:4])
    for picture, scene in zip(pictures, SCENES, strict=False):
        assert judge(picture, scene).seen == replace(scene, background="black")
    black = Scene("circle", "black", "yellow")
    assert judge(drawn(STYLES["night"], [black])[0][0], black).seen.colour == "white"


def test_an_object_follows_its_own_mask_only() -> None:
    pictures, masks = drawn(draw_anywhere)
    assert all(map(follows, pictures, masks))
    smaller = torch.nn.functional.pad(masks[:, ::2, ::2], (32, 32, 32, 32))
    assert not any(map(follows, pictures, smaller))
    assert not any(map(follows, pictures, masks.roll(32, 2)))


def test_pictures_may_differ_by_rounding_only() -> None:
    before = torch.full((3, 8, 8), 100.0)
    left = torch.zeros(8, 8, dtype=torch.bool)
    left[:, :4] = True
    after = before.clone()
    after[:, ~left] = 0
    assert is_unchanged(after + 2, before, left)
    assert not is_unchanged(after, before, ~left)
    assert not is_unchanged(after + 5, before, left)


@pytest.mark.parametrize("kind", list(KINDS))
def test_trials_are_repeatable_held_out_and_differ_from_their_controls(kind: str) -> None:
    some = trials(kind, 4)
    assert [trial.request.prompt for trial in some] == [t.request.prompt for t in trials(kind, 4)]
    assert all(trial.request != trial.control for trial in some)
    assert all(trial.request.seed == trial.control.seed for trial in some)
    words = [set(trial.request.prompt.split()) for trial in some]
    held_out = [s for s in held_out_scenes(400) if is_held_out(s.shape, s.colour, s.background)]
    assert all(any({s.shape, s.colour, s.background} <= w for s in held_out) for w in words)
