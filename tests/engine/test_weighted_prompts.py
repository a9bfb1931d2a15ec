"""Weighted and long prompts, compared with what diffusers' pipelines encode."""

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.tiny_families.stable_diffusion_xl import write_sdxl
from darkroom_server.core.errors import StartupError
from darkroom_server.core.prompt_syntax import (
    MAX_WINDOWS,
    PromptSyntaxError,
    PromptTooLong,
    check_length,
    parse,
)
from darkroom_server.engine.components.weighted_prompts import WeightedPromptEncoder

from .folders import write_second_generation
from .tiny import write_tiny_model

compel = pytest.importorskip("compel", reason="needs darkroom-server[prompt-weights]")

PROMPT = "a large red star on a blue background"
RED = 3
"""The token of "red": behind the start mark and two words."""

SENTENCES = (
    "a large red star on a blue background, a green ring, a white square, a small yellow heart.",
    "a blue ring on a white background, a red heart, a large green square, a small yellow star.",
    "a small green heart on a red background.",
)
"""Each fits a window of 32 tokens, and no two of them together do."""


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


class Encoders:
    """A tiny pipeline, and the encoder of weighted prompts of its text encoders."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.sdxl = hasattr(pipeline, "text_encoder_2")
        self.text_encoders = [pipeline.text_encoder]
        self.tokenizers = [pipeline.tokenizer]
        if self.sdxl:
            self.text_encoders.append(pipeline.text_encoder_2)
            self.tokenizers.append(pipeline.tokenizer_2)
        self.weighted = self.encoder(torch.float32)

    def encoder(self, dtype: torch.dtype) -> WeightedPromptEncoder:
        return WeightedPromptEncoder(
            self.tokenizers, self.text_encoders, dtype, contextlib.nullcontext, sdxl=self.sdxl
        )

    def reference(self, prompt: str, **fields: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What diffusers encodes: the hidden states, and the pooled output if there is one."""
        found = self.pipeline.encode_prompt(
            prompt,
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            **fields,
        )
        return found[0], found[2] if self.sdxl else None


def load(kind: str, folder: Path) -> Encoders:
    torch.set_num_threads(1)  # The threads share out sums, and with them the last bits.
    if kind == "SDXL":
        pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(
            write_sdxl(folder), add_watermarker=False
        )
        # As in the real one, whose second tokenizer pads with another token than the first.
        pipeline.tokenizer_2.pad_token = "!"
        return Encoders(pipeline)
    write = write_tiny_model if kind == "SD 1" else write_second_generation
    return Encoders(
        diffusers.StableDiffusionPipeline.from_pretrained(write(folder), safety_checker=None)
    )


@pytest.fixture(scope="module", params=["SD 1", "SD 2", "SDXL"])
def encoders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Encoders:
    return load(request.param, tmp_path_factory.mktemp("weighted"))


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Encoders:
    return load("SD 1", tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Encoders:
    return load("SDXL", tmp_path_factory.mktemp("sdxl"))


def assert_far(one: torch.Tensor, other: torch.Tensor) -> None:
    """The negative control."""
    assert (one - other).norm() / other.norm() > 1e-3


@pytest.mark.parametrize("prompt", [PROMPT, "", "a star.", " ".join(["star"] * 30)])
def test_text_without_weights_is_what_diffusers_encodes(encoders: Encoders, prompt: str) -> None:
    found = encoders.weighted.encode(prompt)
    hidden, pooled = encoders.reference(prompt)
    assert torch.equal(found.hidden, hidden)
    assert_far(encoders.weighted.encode("a green ring").hidden, hidden)
    if pooled is None:
        assert found.pooled is None
    else:
        assert found.pooled is not None
        assert torch.equal(found.pooled, pooled)
        assert_far(encoders.weighted.encode("a green ring").pooled, pooled)  # type: ignore[arg-type]


def test_brackets_that_are_text(encoders: Encoders) -> None:
    hidden, _ = encoders.reference("a (red) star: [blue]")
    assert torch.equal(encoders.weighted.encode(r"a \(red\) star: \[blue\]").hidden, hidden)
    assert_far(encoders.weighted.encode("a (red) star: [blue]").hidden, hidden)


@pytest.mark.parametrize("weight", [1.1, 1.3, 2.0])
def test_a_weight_above_one_scales_the_distance_from_the_empty_prompt(
    encoders: Encoders, weight: float
) -> None:
    plain, empty = encoders.reference(PROMPT)[0], encoders.reference("")[0]
    found = encoders.weighted.encode(PROMPT.replace("red", f"(red:{weight})")).hidden
    wanted = plain.clone()
    wanted[:, RED] = empty[:, RED] + weight * (plain[:, RED] - empty[:, RED])
    assert (found - wanted).norm() / wanted.norm() < 1e-6
    assert_far(found, plain)


def test_a_weight_below_one_moves_towards_the_prompt_without_the_word(encoders: Encoders) -> None:
    plain = encoders.reference(PROMPT)[0]
    weights = (1.0, 0.75, 0.5, 0.25, 0.0)
    found = [encoders.weighted.encode(PROMPT.replace("red", f"(red:{w})")).hidden for w in weights]
    assert torch.equal(found[0], plain)
    distances = [float((each - plain).norm()) for each in found]
    assert distances == sorted(distances)
    assert len(set(distances)) == len(weights)
    # At 0 nothing is left of the word, so any word of one token gives the same.
    green = encoders.weighted.encode(PROMPT.replace("red", "(green:0)")).hidden
    behind = slice(RED + 1, None)
    assert (found[-1][:, behind] - green[:, behind]).abs().max() < 1e-3
    half = encoders.weighted.encode(PROMPT.replace("red", "(green:0.5)")).hidden
    assert (found[2][:, behind] - half[:, behind]).abs().max() > 1e-3


def test_a_space_with_a_weight_is_not_a_word(encoders: Encoders) -> None:
    found = encoders.weighted.encode("[ (red:1.32) ] star").hidden
    assert torch.equal(found, encoders.weighted.encode("(red:1.2) star").hidden)
    assert_far(found, encoders.weighted.encode("red star").hidden)


@pytest.mark.parametrize(
    "prompt", ["a large (red)1.3 star, a (blue)0.6 ring", "a (large (red)1.2)1.5 star"]
)
def test_the_same_as_compel_itself_reads(encoders: Encoders, prompt: str) -> None:
    kind = compel.CompelForSDXL if encoders.sdxl else compel.CompelForSD
    wanted = kind(encoders.pipeline)(prompt).embeds
    assert torch.equal(encoders.weighted.encode(prompt).hidden, wanted)
    web = prompt.replace(")1.3", ":1.3)").replace(")0.6", ":0.6)").replace(")1.2", ":1.2)")
    web = web.replace(")1.5", ":1.5)")
    assert web != prompt
    assert torch.equal(encoders.weighted.encode(web).hidden, wanted)
    assert_far(encoders.weighted.encode(web.replace("red", "green")).hidden, wanted)


def test_weights_do_not_change_the_pooled_output(sdxl: Encoders) -> None:
    found = sdxl.weighted.encode(PROMPT.replace("red", "(red:1.5)")).pooled
    wanted = sdxl.reference(PROMPT)[1]
    assert found is not None
    assert wanted is not None
    assert torch.equal(found, wanted)


def test_a_long_prompt_is_encoded_in_windows(encoders: Encoders) -> None:
    found = encoders.weighted.encode(" ".join(SENTENCES))
    windows = [encoders.reference(sentence)[0] for sentence in SENTENCES]
    assert found.hidden.shape[1] == 3 * encoders.weighted.window == 3 * windows[0].shape[1]
    assert torch.equal(found.hidden, torch.cat(windows, dim=1))
    assert_far(found.hidden, torch.cat(windows[::-1], dim=1))
    if encoders.sdxl:
        # Of the first window: the pipeline cuts the text there too.
        wanted = encoders.reference(" ".join(SENTENCES))[1]
        assert found.pooled is not None
        assert wanted is not None
        assert torch.equal(found.pooled, wanted)


def test_the_last_word_of_a_long_prompt_counts(encoders: Encoders) -> None:
    words = ["star"] * 100
    one = encoders.weighted.encode(" ".join([*words, "red"])).hidden
    other = encoders.weighted.encode(" ".join([*words, "blue"])).hidden
    start = one.shape[1] - encoders.weighted.window
    assert torch.equal(one[:, :start], other[:, :start])
    assert_far(one[:, start:], other[:, start:])


def test_a_weight_in_a_later_window(encoders: Encoders) -> None:
    plain = encoders.weighted.encode(" ".join(SENTENCES)).hidden
    found = encoders.weighted.encode(
        " ".join(SENTENCES).replace("small green", "(small:1.4) green")
    )
    changed = (found.hidden - plain).abs().amax(dim=(0, 2)).nonzero().flatten().tolist()
    assert changed == [2 * encoders.weighted.window + 2]


def test_padded(encoders: Encoders) -> None:
    prompt = encoders.weighted.encode(" ".join(SENTENCES))
    negative = encoders.weighted.encode("a green ring")
    before = negative.hidden.clone()
    prompt_row, negative_row = encoders.weighted.padded(prompt, negative)
    ring, empty = encoders.reference("a green ring")[0], encoders.reference("")[0]
    assert torch.equal(prompt_row.hidden, prompt.hidden)
    assert torch.equal(negative_row.hidden, torch.cat([ring, empty, empty], dim=1))
    assert torch.equal(negative.hidden, before)
    assert negative_row.pooled is negative.pooled
    assert_far(negative_row.hidden, torch.cat([ring, ring, ring], dim=1))


def test_a_text_for_each_encoder(sdxl: Encoders) -> None:
    found = sdxl.weighted.encode(PROMPT, "a small heart")
    hidden, pooled = sdxl.reference(PROMPT, prompt_2="a small heart")
    assert torch.equal(found.hidden, hidden)
    assert found.pooled is not None
    assert pooled is not None
    assert torch.equal(found.pooled, pooled)
    swapped = sdxl.weighted.encode("a small heart", PROMPT)
    assert_far(swapped.hidden, hidden)
    # A text that is shorter gets windows of an empty prompt.
    long = sdxl.weighted.encode(" ".join(SENTENCES), "a small heart").hidden
    width = long.shape[-1] // 2
    heart, empty = sdxl.reference("a small heart")[0], sdxl.reference("")[0]
    wanted = torch.cat([heart, empty, empty], dim=1)[..., width:]
    assert torch.equal(long[..., width:], wanted)


@pytest.mark.parametrize("long", [False, True])
def test_the_pipelines_take_the_embeddings(encoders: Encoders, long: bool) -> None:
    text = " ".join(SENTENCES) if long else PROMPT
    latents = [denoised(encoders, each) for each in (text, text.replace("red", "(red:1.5)"))]
    assert latents[0].isfinite().all()
    assert_far(latents[1], latents[0])
    if not long:
        wanted = denoised(encoders, None, prompt=PROMPT, negative_prompt="a ring")
        assert torch.equal(latents[0], wanted)


def denoised(encoders: Encoders, text: str | None, **fields: Any) -> torch.Tensor:
    """Latents after two steps, from the embeddings of ``text`` if it is given."""
    if text is not None:
        prompt, negative = encoders.weighted.padded(
            encoders.weighted.encode(text), encoders.weighted.encode("a ring")
        )
        fields = {"prompt_embeds": prompt.hidden, "negative_prompt_embeds": negative.hidden}
        if encoders.sdxl:
            fields |= {
                "pooled_prompt_embeds": prompt.pooled,
                "negative_pooled_prompt_embeds": negative.pooled,
            }
    encoders.pipeline.set_progress_bar_config(disable=True)
    (latents,) = encoders.pipeline(
        **fields,
        num_inference_steps=2,
        guidance_scale=5.0,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        return_dict=False,
    )[:1]
    assert isinstance(latents, torch.Tensor)
    return latents


def test_the_dtype_is_the_denoisers(sdxl: Encoders) -> None:
    half = sdxl.encoder(torch.bfloat16)
    found = half.encode(PROMPT)
    assert found.pooled is not None
    assert found.hidden.dtype == found.pooled.dtype == torch.bfloat16
    assert torch.equal(found.hidden, sdxl.reference(PROMPT)[0].bfloat16())
    assert half.padded(half.encode(" ".join(SENTENCES)), found)[1].hidden.dtype == torch.bfloat16


def test_a_bad_prompt_reaches_no_encoder(sd: Encoders) -> None:
    with token_calls(sd) as calls:
        with pytest.raises(PromptSyntaxError, match="not closed"):
            sd.weighted.encode("a (red star")
        assert calls == []
        sd.weighted.encode("a red star")
        assert calls


def test_without_compel(sd: Encoders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "compel", None)
    with pytest.raises(StartupError, match=r"pip install 'darkroom-server\[prompt-weights\]'"):
        sd.encoder(torch.float32)


@contextlib.contextmanager
def token_calls(encoders: Encoders) -> Iterator[list[list[int]]]:
    """A list that gets the tokens of each call of the first text encoder."""
    calls: list[list[int]] = []
    hook = encoders.text_encoders[0].register_forward_pre_hook(
        lambda _, inputs: calls.append(inputs[0][0].tolist())
    )
    yield calls
    hook.remove()


WORD = st.sampled_from(["red", "star", "a", "unwritten", "é", "🌟", "!", ".", ",", "'s", "9"])
SPECIAL = st.sampled_from(["<|endoftext|>", "<|startoftext|>", "\t", "\x00", "\u200b"])


def parts_of(word: st.SearchStrategy[str], *weights: str) -> st.SearchStrategy[Any]:
    texts = st.lists(word, min_size=1, max_size=20).map(" ".join).filter(str.strip)
    return st.lists(st.tuples(texts, st.sampled_from(weights)), max_size=3)


@settings(max_examples=40)
@given(parts_of(WORD, "1", "1.2", "2"))
def test_no_token_is_cut(sd: Encoders, parts: list[tuple[str, str]]) -> None:
    with token_calls(sd) as calls:
        sd.weighted.encode(" ".join(f"({text}:{weight})" for text, weight in parts))
    tokenizer = sd.tokenizers[0]
    marks = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    read = [token for window in calls for token in window if token not in marks]
    texts = [tokenizer(text).input_ids for text, _ in parts]
    assert read == [token for ids in texts for token in ids if token not in marks]
    assert {len(window) for window in calls} == {tokenizer.model_max_length}


@settings(max_examples=40)
@given(parts_of(WORD | SPECIAL, "0", "0.3", "0.9", "1", "1.7"))
def test_any_prompt_that_is_parsed_is_encoded(sd: Encoders, parts: list[tuple[str, str]]) -> None:
    found = sd.weighted.encode(", ".join(f"({text}:{weight})" for text, weight in parts))
    assert found.hidden.isfinite().all()
    assert found.hidden.shape[1] % sd.weighted.window == 0


ANY_TEXT = st.lists(WORD | st.text(max_size=6), max_size=20).map(" ".join)


@settings(max_examples=300)
@given(ANY_TEXT)
def test_the_door_rejects_only_what_has_too_many_tokens(sd: Encoders, text: str) -> None:
    escaped = re.sub(r"([\\()\[\]:|<])", r"\\\1", text).replace("AND", "&").replace("BREAK", "&")
    tokens = sum(
        len(sd.tokenizers[0](part.text, verbose=False).input_ids) - 2 for part in parse(escaped)
    )
    with contextlib.suppress(PromptTooLong):
        check_length(escaped, 2 + 1)
        return
    assert tokens > MAX_WINDOWS
