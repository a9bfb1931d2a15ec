"""Writes prompts for scenes, with enough variety to make free prompts work.

The grammar, with optional parts in brackets:

    [a] [small|large] COLOUR SHAPE [PLACE] on a COLOUR background

PLACE is "on the left", "on the right", "at the top" or "at the bottom"; "a" is "an" before
"orange". Training also uses the same words in other orders, prompts that leave parts open, stray
words, and empty prompts.
"""

from __future__ import annotations

import re

import numpy as np

from training.scenes import COLOURS, SHAPES, Scene

PLACES = {
    "centre": "",
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}
_FILLERS = ("photo", "picture", "painting", "drawing", "of", "nice", "with", "and", "here")
_SYNONYMS = ("small", "medium", "large", "big", "tiny", "centre", "center", "middle")
_GRAMMAR = ("left", "right", "top", "bottom", "a", "an", "the", "on", "at", "in", "background")
WORDS = tuple(dict.fromkeys((*COLOURS, *SHAPES, *_SYNONYMS, *_GRAMMAR, *_FILLERS)))
"""Every word with its own token; other words are spelt in bytes."""

_EMPTY = 0.12
_OPEN = 0.10
_STRAY = 0.12
_SIZE_WORDS = {
    "small": ("small", "small", "small", "tiny"),
    "medium": ("", "", "", "", "medium"),
    "large": ("large", "large", "large", "big"),
}


def prompt_for(scene: Scene) -> str:
    """Return the plain prompt of a scene: "a small red star on the left on a blue background"."""
    size = "" if scene.size == "medium" else scene.size
    parts = ["a", size, scene.colour, scene.shape, PLACES[scene.position]]
    parts += ["on a", scene.background, "background"]
    return _with_articles(" ".join(part for part in parts if part))


def random_prompt(scene: Scene, rng: np.random.Generator, ease: float = 0.0) -> str:
    """Return a prompt for a scene in a random phrasing; about one in eight is empty.

    Of the others, a share `ease`, 0..1, is the plain prompt.
    """
    if rng.random() < _EMPTY:
        return ""
    if rng.random() < ease:
        return prompt_for(scene)
    prompt = _open_prompt(scene, rng) if rng.random() < _OPEN else _full_prompt(scene, rng)
    if rng.random() < 0.8:
        prompt = _with_articles(prompt)
    if rng.random() < _STRAY:
        words = prompt.split()
        for _ in range(int(rng.integers(1, 4))):
            words.insert(int(rng.integers(len(words) + 1)), _stray_word(rng))
        prompt = " ".join(words)
    return prompt


def _with_articles(prompt: str) -> str:
    return re.sub(r"\ba (?=orange)", "an ", prompt)


def _full_prompt(scene: Scene, rng: np.random.Generator) -> str:
    if rng.random() < 0.5:
        return prompt_for(scene)
    thing = f"{_any_size(scene, rng)} {scene.colour} {scene.shape}"
    if rng.random() < 0.7:
        thing = f"a {thing}"
    place, ground = PLACES[scene.position], scene.background
    phrasings = [
        f"{thing} {place} on a {ground} background",
        f"{thing} {place} on {ground} background",
        f"{thing} {place} on {ground}",
        f"{thing} {place}, {ground} background",
        f"a {ground} background with {thing} {place}",
    ]
    if place:
        phrasings.append(f"{thing} on a {ground} background, {place}")
        phrasings.append(f"{thing} on a {ground} background, {scene.position}")
        phrasings.append(f"{thing} {place} of a {ground} background")
    return " ".join(phrasings[int(rng.integers(len(phrasings)))].split())


def _open_prompt(scene: Scene, rng: np.random.Generator) -> str:
    """Return a prompt that leaves part of the scene open."""
    prompts = [
        f"a {_any_size(scene, rng)} {scene.colour} {scene.shape}",
        f"{scene.colour} {scene.shape} {PLACES[scene.position]}",
        f"a {scene.shape}",
        f"a {scene.shape} on a {scene.background} background",
        f"a {scene.background} background",
        scene.colour,
    ]
    return " ".join(prompts[int(rng.integers(len(prompts)))].split())


def _any_size(scene: Scene, rng: np.random.Generator) -> str:
    words = _SIZE_WORDS[scene.size]
    return words[int(rng.integers(len(words)))]


def _stray_word(rng: np.random.Generator) -> str:
    kind = rng.random()
    if kind < 0.5:
        return _FILLERS[int(rng.integers(len(_FILLERS)))]
    if kind < 0.9:
        letters = rng.integers(ord("a"), ord("z") + 1, size=int(rng.integers(2, 7)))
        return "".join(map(chr, letters))
    # Emoji and ideographs reach the model as bytes; it must learn to ignore them.
    return chr(int(rng.integers(0x1F300, 0x1F5FF) if kind < 0.95 else rng.integers(0x4E00, 0x9FA5)))
