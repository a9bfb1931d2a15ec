from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training.prompts import WORDS, prompt_for, random_prompt
from training.scenes import Scene, random_scene
from training.tokenizer import MAX_TOKENS, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_plain_prompts() -> None:
    assert prompt_for(Scene("star", "yellow", "blue", "large")) == (
        "a large yellow star on a blue background"
    )
    assert prompt_for(Scene("ring", "orange", "orange", "medium", "left")) == (
        "an orange ring on the left on an orange background"
    )


@pytest.mark.parametrize("word", WORDS)
def test_every_word_is_one_token(tokenizer: Any, word: str) -> None:
    assert tokenizer.tokenize(word) == [word + "</w>"]


@pytest.mark.parametrize("prompt", ["🎉 party", "日本語", "naïve zebra", "\x00\x7f", "a\nb", "Ω≈ç"])
def test_any_text_can_be_tokenized(tokenizer: Any, prompt: str) -> None:
    ids = tokenizer(prompt).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert len(ids) > 2
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids[1:-1])


def test_prompts_are_cut_and_padded_to_one_length(tokenizer: Any) -> None:
    for prompt in ("", "a red star", "zebra " * 50):
        ids = tokenizer(
            prompt, padding="max_length", max_length=tokenizer.model_max_length, truncation=True
        ).input_ids
        assert len(ids) == MAX_TOKENS
        assert ids[-1] == tokenizer.eos_token_id == max(tokenizer.get_vocab().values())


def test_tokenizer_survives_saving(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    prompt = "a small red star, at the top 🎉"
    assert again(prompt).input_ids == tokenizer(prompt).input_ids
    assert again.model_max_length == MAX_TOKENS


def test_random_prompts_vary_and_some_are_empty(tokenizer: Any) -> None:
    rng = np.random.default_rng(0)
    prompts = [random_prompt(random_scene(rng), rng) for _ in range(2000)]
    assert 0.09 < sum(p == "" for p in prompts) / len(prompts) < 0.15
    assert len(set(prompts)) > 1000
    lengths = [len(tokenizer.tokenize(p)) for p in prompts]
    assert np.mean([n <= MAX_TOKENS - 2 for n in lengths]) > 0.99


def test_easy_prompts_are_plain_or_empty() -> None:
    rng = np.random.default_rng(0)
    scene = random_scene(rng)
    prompts = {random_prompt(scene, rng, ease=1.0) for _ in range(200)}
    assert prompts == {"", prompt_for(scene)}
