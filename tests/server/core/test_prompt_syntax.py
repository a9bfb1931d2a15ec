"""The weighted prompt syntax: weights as web UIs and compel write them, and what is an error."""

import subprocess
import sys
import time

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from darkroom_server.core.prompt_syntax import (
    MAX_ENCODED_BYTES,
    MAX_WEIGHT,
    MAX_WINDOWS,
    Part,
    PromptSyntaxError,
    PromptTooLong,
    check,
    check_length,
    parse,
)

WINDOW = 77
BELOW = round(1 / 1.1, 6)

VALID: dict[str, list[tuple[str, float]]] = {
    "": [],
    "a red circle": [("a red circle", 1)],
    "a (red) circle": [("a ", 1), ("red", 1.1), (" circle", 1)],
    "((red))": [("red", 1.21)],
    "[red]": [("red", BELOW)],
    "[(red)]": [("red", 1)],
    "a (red:1.3) circle": [("a ", 1), ("red", 1.3), (" circle", 1)],
    "(red : 1.3 )": [("red ", 1.3)],
    "(red:0)": [("red", 0)],
    "(red:2)": [("red", 2)],
    "(red:.5)": [("red", 0.5)],
    "a (red)1.3 circle": [("a ", 1), ("red", 1.3), (" circle", 1)],
    "(red)0.5, blue": [("red", 0.5), (", blue", 1)],
    "the end (red)1.": [("the end ", 1), ("red", 1), (".", 1)],
    "(a (red:1.2) circle:1.5)": [("a ", 1.5), ("red", 1.8), (" circle", 1.5)],
    "((red)1.2:1.5)": [("red", 1.8)],
    "(red:1.2) (blue:1.2)": [("red", 1.2), (" ", 1), ("blue", 1.2)],
    "(photo)graph": [("photo", 1.1), ("graph", 1)],
    "(a cat)-like dog": [("a cat", 1.1), ("-like dog", 1)],
    "16:9, a|b, c++": [("16:9, a|b, c++", 1)],
    "(a|b)": [("a|b", 1.1)],
    "(title: star:1.2)": [("title: star", 1.2)],
    r"\(red\) \[blue\]": [("(red) [blue]", 1)],
    r"(16\:9)": [("16:9", 1.1)],
    r"[a\:b\|c]": [("a:b|c", BELOW)],
    r"(smile \:\):1.2)": [("smile :)", 1.2)],
    r"\\(red)": [("\\", 1), ("red", 1.1)],
    "\\m/ and \\": [("\\m/ and \\", 1)],
    r"\<lora:x\>": [(r"<lora:x\>", 1)],
    "break and Android": [("break and Android", 1)],
    "é (ü:1.5) 🌟": [("é ", 1), ("ü", 1.5), (" 🌟", 1)],
}


@pytest.mark.parametrize("text", VALID)
def test_valid(text: str) -> None:
    assert parse(text) == tuple(Part(*part) for part in VALID[text])
    check(text)


INVALID = {
    "a (red": r"character 3: '\(' is not closed",
    "a (red [blue)": r"character 13: '\)' closes '\[' of character 8",
    "red) a": r"character 4: '\)' closes nothing; write \\\)",
    ":)": "closes nothing",
    "[red": r"'\[' is not closed; write \\\[",
    "red]": "']' closes nothing",
    "(red:2.1)": "character 5: weight 2.1 is not in 0 to 2",
    "(red:-0.1)": "weight -0.1 is not in 0 to 2",
    "(red)5": "character 6: weight 5 is not in 0 to 2",
    "(red:" + "9" * 400 + ")": "is not in 0 to 2",
    "(red:high)": "'high' is not a weight; write a number",
    "(red:1,3)": "'1,3' is not a weight",
    "(red:nan)": "'nan' is not a weight",
    "(red:1e0)": "'1e0' is not a weight",
    "(red:\u0661)": "is not a weight",
    "(red:)": "'' is not a weight",
    "(red:1.2 (blue))": r"'1.2 \(blue\)' is not a weight",
    "(red:1.3)1.2": "character 10: a second weight",
    "(red)3d": "write a space before text",
    "(red)1.3.5": "write a space before text",
    "(red)++": r"'\+\+' directly behind a bracket",
    "(red)-, blue": "'-' directly behind a bracket",
    "((red:2):1.5)": "multiply to 3, above 2",
    "(" * 8 + "red" + ")" * 8: "multiply to 2.14359, above 2",
    "()": "brackets without text",
    "a ( ) b": "brackets without text",
    "(:1.3)": "brackets without text",
    "[red:blue:0.5]": "change between steps",
    "[red:0.5]": "change between steps",
    "[red|blue]": "change between steps",
    "red BREAK blue": "character 5: 'BREAK' is not supported; write it in small letters",
    "red AND blue": "'AND' is not supported",
    "<lora:style:0.8>": r"'<lora:' is not supported; write \\<",
    '("red", "blue").blend(1, 1)': r"'.blend\(' is not supported",
    "a red.swap(blue)": r"'.swap\(' is not supported",
}


@pytest.mark.parametrize("text", INVALID)
def test_invalid(text: str) -> None:
    with pytest.raises(PromptSyntaxError, match=INVALID[text]) as caught:
        check(text)
    assert isinstance(caught.value, ValueError)
    assert len(str(caught.value)) < 200


def test_a_bound_on_what_is_encoded() -> None:
    """Each part below 1 costs an encoding of the whole prompt; parts above 1 cost none."""
    text = "(red:0.5) " + "x" * 1014
    most = MAX_ENCODED_BYTES // 1024 - 1
    check(text)
    check("[a]" * most + "x" * (1024 - 3 * most))
    with pytest.raises(PromptSyntaxError, match=f"at most {most} are supported"):
        check("[a]" * (most + 1) + "x" * (1024 - 3 * (most + 1)))
    check("(a)" * 2730)


PLAIN = st.text(st.characters(exclude_characters="\\()[]:|<", exclude_categories=["Cs"]))


@given(st.text(alphabet="ab1.+-:|\\()[]< ", max_size=40) | st.text(max_size=40))
def test_any_text_is_parsed_or_rejected(text: str) -> None:
    try:
        parts = parse(text)
    except PromptSyntaxError:
        return
    assert all(0 <= part.weight <= MAX_WEIGHT for part in parts if part.text.strip())
    assert all(part.text for part in parts)
    escaped = "".join(part.text for part in parts)
    assert sorted(set(escaped) - set(text)) == [], "only characters of the text"


@given(PLAIN)
def test_text_without_brackets_is_itself(text: str) -> None:
    assume("AND" not in text and "BREAK" not in text)
    assert parse(text) == ((Part(text, 1.0),) if text else ())


@given(st.lists(st.tuples(st.text("abc ,.", min_size=1), st.integers(10, 20))))
def test_written_parts_are_read_again(wanted: list[tuple[str, int]]) -> None:
    wanted = [(text, weight) for text, weight in wanted if text.strip()]
    web = "".join(f"({text}:{weight / 10})" for text, weight in wanted)
    compel = "".join(f"({text}){weight / 10}" for text, weight in wanted)
    parts = tuple(Part(text, weight / 10) for text, weight in wanted)
    assert parse(web) == parse(compel) == parts


def test_deep_brackets_take_no_recursion_and_little_time() -> None:
    """A caller cannot stop the server with one prompt."""
    began = time.perf_counter()
    for _ in range(5):
        check("[" * 4000 + "red" + "]" * 4000)
        with pytest.raises(PromptSyntaxError, match="multiply"):
            check("(" * 4000 + "red" + ")" * 4000)
    assert time.perf_counter() - began < 5, "it is linear in the length"


def test_the_parser_needs_no_torch() -> None:
    """The serving process rejects a bad prompt without the engine's libraries."""
    program = (
        "import sys; from darkroom_server.core.prompt_syntax import check; check('(a:1.2)');"
        "print(sorted({'torch', 'compel', 'transformers'} & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_a_prompt_is_surely_too_long_if_its_words_do_not_fit() -> None:
    most = MAX_WINDOWS * (WINDOW - 2)
    check_length("red " * most, WINDOW)
    check_length("(red)" * most, WINDOW)
    check_length("red ... - !" + " " * 10_000 + ", " * 10_000, WINDOW)
    check_length("7" * 100_000, WINDOW)  # One word, of an unknown number of tokens.
    for text in ("red " * (most + 1), "(red)" * (most + 1)):
        with pytest.raises(PromptTooLong, match=f"more than {MAX_WINDOWS} windows of 77") as error:
            check_length(text, WINDOW)
        assert error.value.text == text
    with pytest.raises(PromptSyntaxError):
        check_length("(red", WINDOW)
