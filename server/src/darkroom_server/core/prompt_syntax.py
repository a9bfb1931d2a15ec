r"""The weighted prompt syntax: parsed without torch, so that a bad prompt is rejected at once.

=================  ==============================================================
``(red)``          weight 1.1; brackets nest, and their weights multiply
``[red]``          weight 1 / 1.1
``(red:1.3)``      weight 1.3, as web UIs write it
``(red)1.3``       the same, as compel writes it
``\( \) \[ \]``    a bracket that is text; so with ``\:``, ``\|``, ``\<`` and ``\\``
=================  ==============================================================

What web UIs or compel read in another way, and nothing here does, is an error and not text.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

MAX_WEIGHT = 2.0
"""The highest weight, of one bracket and of all around a word together; the lowest is 0."""

BRACKET = 1.1
"""The weight of round brackets without a number."""

MAX_ENCODED_BYTES = 65536
"""Bytes of UTF-8 that are encoded for one prompt.

Each part with a weight below 1 costs one more encoding of the whole prompt, because the library
compares the prompt with and without that part.
"""

MAX_WINDOWS = 8
"""Windows of the text encoder that one prompt may need.

With 77 tokens each, the denoiser's attention to the prompt is smaller than that to an image of
32×32 latent pixels, so a batch needs little more memory than was measured with one window.
"""

_ESCAPED = r"\\[\\()\[\]:|<]"
_TOKEN = re.compile(rf"{_ESCAPED}|[()\[\]:|]|[^\\()\[\]:|]+|\\")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)")
_MORE_OF_A_WORD = re.compile(r"\w|\.[0-9]")
_PLUS_OR_MINUS = re.compile(r"(?:\++|-+)(?!\w)")
_UNSUPPORTED = re.compile(
    rf"{_ESCAPED}|(?P<word>\b(?:AND|BREAK)\b)|(?P<tag><(?:lora|lyco|hypernet):)"
    r"|(?P<call>\.(?:and|blend|swap|withLora)\()"
)
_REMEDIES = {
    "word": "is not supported; write it in small letters if it is text",
    "tag": r"is not supported; write \< if it is text",
    "call": r"is not supported; write \( if it is text",
}


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a prompt; ``weight`` is 0 to 2, and 1 is that of text without brackets."""

    text: str
    weight: float


class PromptSyntaxError(ValueError):
    """The prompt is not valid in the weighted syntax; the text says where, and what is valid."""

    def __init__(self, position: int, problem: str) -> None:
        super().__init__(f"character {position + 1}: {problem}")


class PromptTooLong(ValueError):
    """``text`` needs more than ``MAX_WINDOWS`` windows of ``window`` tokens."""

    def __init__(self, text: str, window: int) -> None:
        super().__init__(f"needs more than {MAX_WINDOWS} windows of {window} tokens")
        self.text = text


def check(text: str) -> None:
    """Raise ``PromptSyntaxError`` if ``text`` is not valid in the weighted syntax."""
    parse(text)


def parse(text: str) -> tuple[Part, ...]:
    """The parts of a prompt, in order; their texts together are the prompt without its weights.

    The time is linear in the length. Raises ``PromptSyntaxError``.
    """
    _reject_unsupported(text)
    groups = _groups(text)
    parts = tuple(_parts(text, groups))
    below = sum(part.weight < 1 for part in parts)
    size = len(text.encode(errors="replace"))
    if below and (1 + below) * size > MAX_ENCODED_BYTES:
        raise PromptSyntaxError(
            0,
            f"{below} parts with weights below 1 in a prompt of {size} bytes; at most "
            f"{max(0, MAX_ENCODED_BYTES // size - 1)} are supported in a prompt of this length",
        )
    return parts


def check_length(text: str, window: int) -> None:
    """Raise ``PromptTooLong`` if ``text``, which is valid, surely needs too many windows.

    ``window`` is in tokens, with a start and an end mark. A word has at least one token; how many
    it has, only the text encoder's tokenizer knows.
    """
    words = (word for part in parse(text) for word in part.text.split())
    if sum(any(map(str.isalnum, word)) for word in words) > MAX_WINDOWS * (window - 2):
        raise PromptTooLong(text, window)


@dataclass(slots=True)
class _Group:
    """A pair of brackets. ``end`` is that of its text, ``after`` is behind its last character."""

    start: int
    colon: int | None = None
    bar: int | None = None
    weight: float = BRACKET
    end: int = 0
    after: int = 0


def _reject_unsupported(text: str) -> None:
    for match in _UNSUPPORTED.finditer(text):
        if match.lastgroup is not None:
            raise PromptSyntaxError(
                match.start(), f"{match.group()!r} {_REMEDIES[match.lastgroup]}"
            )


def _groups(text: str) -> dict[int, _Group]:
    """The pairs of brackets by the position of the first of each pair."""
    groups: dict[int, _Group] = {}
    opened: list[_Group] = []
    for match in _TOKEN.finditer(text):
        token, position = match.group(), match.start()
        if token in ("(", "["):
            groups[position] = _Group(position)
            opened.append(groups[position])
        elif token in (")", "]"):
            if not opened:
                raise PromptSyntaxError(
                    position, rf"{token!r} closes nothing; write \{token} if it is text"
                )
            group = opened.pop()
            first = text[group.start]
            if first + token not in ("()", "[]"):
                raise PromptSyntaxError(
                    position, f"{token!r} closes {first!r} of character {group.start + 1}"
                )
            _close(text, group, position)
        elif opened and token == ":":
            opened[-1].colon = position
        elif opened and token == "|":
            opened[-1].bar = position
    if opened:
        start = opened[-1].start
        raise PromptSyntaxError(
            start, rf"{text[start]!r} is not closed; write \{text[start]} if it is text"
        )
    return groups


def _close(text: str, group: _Group, position: int) -> None:
    """Read the weight of ``group``, whose last bracket is at ``position``."""
    group.end, group.after = position, position + 1
    if text[position] == "]":
        if group.colon is not None or group.bar is not None:
            raise PromptSyntaxError(
                group.start,
                "prompts that change between steps, [a:b:0.5] and [a|b], are not supported; write "
                r"(a:0.9) for a weight, \: or \| for text",
            )
        group.weight = 1 / BRACKET
    else:
        if group.colon is not None:
            group.end = group.colon
            group.weight = _weight(text[group.colon + 1 : position].strip(), group.colon)
        _read_number_behind(text, group)
    if not text[group.start + 1 : group.end].strip():
        raise PromptSyntaxError(group.start, "brackets without text")


def _read_number_behind(text: str, group: _Group) -> None:
    """Read the weight in ``(red)1.3``."""
    number = _NUMBER.match(text, group.after)
    if number is None:
        if sign := _PLUS_OR_MINUS.match(text, group.after):
            raise PromptSyntaxError(
                group.after,
                f"{sign.group()!r} directly behind a bracket is not supported; write (red:1.2) for "
                "a weight, a space before text",
            )
        return
    if group.colon is not None:
        raise PromptSyntaxError(group.after, "a second weight; write one, as in (red:1.3)")
    if _MORE_OF_A_WORD.match(text, number.end()):
        raise PromptSyntaxError(
            group.after, "a number behind a bracket is its weight; write a space before text"
        )
    group.weight = _weight(number.group(), group.after)
    group.after = number.end()


def _weight(number: str, position: int) -> float:
    if not _NUMBER.fullmatch(number):
        raise PromptSyntaxError(
            position,
            rf"{number[:20]!r} is not a weight; write a number, as in (red:1.3), or \: for text",
        )
    weight = float(number)
    if not 0 <= weight <= MAX_WEIGHT:
        raise PromptSyntaxError(position, f"weight {number[:20]} is not in 0 to {MAX_WEIGHT:g}")
    return weight


def _parts(text: str, groups: dict[int, _Group]) -> Iterator[Part]:
    """The text between brackets, with the product of the weights around it."""
    opened: list[_Group] = []
    weights = [1.0]
    start = position = 0
    while position < len(text):
        if opened and position == opened[-1].end:
            yield from _part(text, start, position, weights.pop())
            position = start = opened.pop().after
        elif position in groups:
            yield from _part(text, start, position, weights[-1])
            opened.append(groups[position])
            weights.append(weights[-1] * groups[position].weight)
            position = start = position + 1
        else:
            position += 1
    yield from _part(text, start, position, weights[-1])


def _part(text: str, start: int, end: int, weight: float) -> Iterator[Part]:
    found = re.sub(_ESCAPED, lambda match: match.group()[1], text[start:end])
    weight = round(weight, 6)  # [(red)] is exactly 1.
    if found.strip() and not 0 <= weight <= MAX_WEIGHT:
        raise PromptSyntaxError(
            start, f"the weights around it multiply to {weight:g}, above {MAX_WEIGHT:g}"
        )
    if found:
        yield Part(found, weight)
