from collections import Counter

import numpy as np
import pytest
import torch

from training.evaluate import held_out_scenes
from training.judge import judge
from training.scenes import (
    COLOURS,
    POSITIONS,
    SHAPES,
    SIZES,
    Placement,
    Scene,
    held_out_triples,
    is_held_out,
    random_placement,
    random_scene,
    training_triples,
    triples,
)
from training.shapes import coverage, draw_randomly


def test_split_is_a_partition() -> None:
    training, held_out = set(training_triples()), set(held_out_triples())
    assert not training & held_out
    assert training | held_out == set(triples())
    assert (len(training), len(held_out)) == (280, 56)


@pytest.mark.parametrize("pair", [(0, 1), (0, 2), (1, 2)])
def test_every_pair_of_words_occurs_in_training(pair: tuple[int, int]) -> None:
    met = Counter((t[pair[0]], t[pair[1]]) for t in training_triples())
    assert set(met) == {(t[pair[0]], t[pair[1]]) for t in triples()}


def test_training_never_uses_held_out_scenes() -> None:
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng) for _ in range(3000)]
    assert not any(is_held_out(s.shape, s.colour, s.background) for s in scenes)
    assert {s.shape for s in scenes} == set(SHAPES)
    assert {s.position for s in scenes} == set(POSITIONS)


def test_easy_scenes_are_large_and_in_the_middle_and_otherwise_vary() -> None:
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng, ease=1.0) for _ in range(500)]
    assert {(s.size, s.position) for s in scenes} == {("large", "centre")}
    assert {s.shape for s in scenes} == set(SHAPES)
    assert {s.colour for s in scenes} == set(COLOURS)


def test_evaluation_uses_only_what_is_held_out() -> None:
    scenes = held_out_scenes(200)
    assert len(set(scenes)) == 200
    assert all(is_held_out(s.shape, s.colour, s.background) for s in scenes)


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_scale_and_stay_inside(shape: str) -> None:
    small, large = (
        coverage(shape, [Placement(0.5, 0.5, radius)], 128, 128)[0] for radius in (0.18, 0.36)
    )
    assert small.min() == 0
    assert small.max() == 1
    assert large.sum().item() == pytest.approx(4 * small.sum().item(), rel=0.02)
    torch.testing.assert_close(small, small.flip(1), atol=1e-3, rtol=0)


def test_circle_covers_its_area() -> None:
    mask = coverage("circle", [Placement(0.5, 0.5, 0.3)], 128, 128)[0]
    assert mask.mean().item() == pytest.approx(np.pi * (0.95 * 0.3) ** 2, rel=1e-3)


@pytest.mark.parametrize(("height", "width"), [(128, 128), (64, 192), (256, 96)])
def test_pictures_have_exact_colours_and_free_corners(height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    scenes = [
        Scene(shape, "red", "blue", size, position)
        for shape in SHAPES
        for size in SIZES
        for position in POSITIONS
    ]
    pictures, masks = draw_randomly(scenes, rng, height, width)
    levels = ((pictures + 1) * 127.5).permute(0, 2, 3, 1)
    red, blue = (torch.tensor(COLOURS[name]).float() for name in ("red", "blue"))
    torch.testing.assert_close(levels[masks == 1], red.expand_as(levels[masks == 1]))
    for row in (0, -1):
        for column in (0, -1):
            torch.testing.assert_close(
                levels[:, row, column], blue.expand(len(scenes), 3), atol=1e-3, rtol=1e-5
            )


def test_position_words_move_the_shape() -> None:
    rng = np.random.default_rng(0)
    for size in SIZES:
        left, right, top, bottom = (
            random_placement(Scene("star", "red", "blue", size, p), rng, 128, 192)
            for p in ("left", "right", "top", "bottom")
        )
        assert left.x < 0.75 < right.x
        assert top.y < 0.5 < bottom.y


def test_judge_accepts_every_perfect_image() -> None:
    scenes = held_out_scenes(12)
    pictures, _ = draw_randomly(scenes, np.random.default_rng(1), 128, 128)
    for picture, scene in zip((pictures + 1) * 127.5, scenes, strict=True):
        verdict = judge(picture, scene)
        assert verdict.seen == scene
        assert verdict.background
        assert verdict.shape
        assert verdict.crisp
        assert verdict.overlap > 0.95


def test_judge_rejects_wrong_images() -> None:
    drawn = Scene("square", "red", "blue")
    pictures, _ = draw_randomly([drawn], np.random.default_rng(1), 128, 128)
    verdict = judge((pictures[0] + 1) * 127.5, Scene("star", "green", "white", "large", "left"))
    assert not any(
        (verdict.background, verdict.colour, verdict.shape, verdict.size, verdict.position)
    )
    assert not verdict.crisp


def test_judge_distinguishes_a_blurred_shape_from_a_sharp_one() -> None:
    scene = Scene("star", "yellow", "blue", "small")
    pictures, _ = draw_randomly([scene], np.random.default_rng(1), 128, 128)
    blurred = torch.nn.functional.avg_pool2d(pictures, 13, 1, 6, count_include_pad=False)
    verdict = judge((blurred[0] + 1) * 127.5, scene)
    assert not verdict.crisp


def test_judge_finds_no_object_in_a_flat_picture() -> None:
    flat = torch.tensor(COLOURS["blue"]).float().view(3, 1, 1).expand(3, 128, 128)
    verdict = judge(flat, Scene("star", "green", "blue"))
    assert verdict.background
    assert not verdict.colour
    assert not verdict.shape
