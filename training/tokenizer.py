"""The tokenizer: a CLIP tokenizer with one token for each word of the grammar."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import CLIPTokenizer

from training.prompts import WORDS

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 32
"""Tokens of a prompt, including the start and the end token; longer prompts are cut."""

_WORD_END = "</w>"


def byte_symbols() -> list[str]:
    """Return the 256 printable characters for bytes, in byte order (after GPT-2's encoder)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    symbols, spare = [], 0x100
    for byte in range(256):
        if byte in printable:
            symbols.append(chr(byte))
        else:
            symbols.append(chr(spare))
            spare += 1
    return symbols


def merges() -> list[tuple[str, str]]:
    """Return the merges that build every word of the grammar from its first letter on.

    Longer words come first, because a short word's merges could split a longer one; "centre" comes
    before "triangle", whose "tr" would split it. A test checks that every word is one token.
    """
    found: dict[tuple[str, str], None] = {}
    for word in sorted(WORDS, key=lambda w: (w != "centre", -len(w), w)):
        pieces = [*word[:-1], word[-1] + _WORD_END]
        built = pieces[0]
        for piece in pieces[1:]:
            found.setdefault((built, piece))
            built += piece
    return list(found)


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write a tokenizer into `folder` and load it back as any pipeline would.

    Every byte is a token, alone and at a word's end, so every prompt can be tokenized. The end
    token has the highest id, because CLIP's text model may find it by `argmax`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    symbols = byte_symbols()
    pairs = merges()
    tokens = [*symbols, *(s + _WORD_END for s in symbols), *(a + b for a, b in pairs), BOS, EOS]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "unk_token": EOS}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_TOKENS,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", "utf-8")
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
    return tokenizer
