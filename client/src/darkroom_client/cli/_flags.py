"""The flags of the command line: for each name of the SDK, and for a name that nobody knows."""

import argparse
import difflib
import re
from collections.abc import Iterable

from darkroom_client._errors import DarkroomError, ModelNotFound

_FLAGS = {
    "prompt": "the prompt",
    "negative_prompt": "--negative",
    "model": "--model",
    "width": "--size",
    "height": "--size",
    "steps": "--steps",
    "guidance_scale": "--guidance",
    "seed": "--seed",
    "image_count": "--count",
    "scheduler": "--scheduler",
    "format": "--format",
    "quality": "--quality",
    "request_id": "--request-id",
    "time_limit": "--time-limit",
    "true_cfg_scale": "--true-cfg-scale",
    "max_sequence_length": "--max-sequence-length",
    "prompt_2": "--prompt-2",
    "negative_prompt_2": "--negative-2",
    "prompt_3": "--prompt-3",
    "negative_prompt_3": "--negative-3",
    "empty_negative_prompt": "--empty-negative",
    "guidance_rescale": "--guidance-rescale",
    "prompt_syntax": "--prompt-syntax",
    "preview.every_steps": "--preview",
    "image": "--image",
    "mask_image": "--mask",
    "strength": "--strength",
    "reference_images": "--reference",
    "loras": "--lora",
    "controls": "--control",
    "ip_adapter_image": "--ip-adapter-image",
    "ip_adapter_scale": "--ip-adapter-scale",
}
"""The flag of each field of a request."""

PHRASES = {
    "(Client(...), DARKROOM_TARGET)": "(--target, DARKROOM_TARGET)",
    "(tls=TLS(...), DARKROOM_CA)": "(--tls, --ca, DARKROOM_CA)",
    "pass tls=TLS(...) (or set DARKROOM_CA), or insecure=True if": (
        "pass --tls or --ca (or set DARKROOM_CA), or --insecure if"
    ),
    "insecure=True means no TLS: pass either insecure or tls": (
        "--insecure means no TLS: it does not go with --tls, --ca, --cert or --server-name"
    ),
    "TLS: cert and key go together": "--cert and --key go together",
    "pass overwrite=True to replace it": "--overwrite replaces it",
    "Then pass a longer timeout": "Then pass a longer --timeout",
    ", or raise max_reply_bytes": "",
    "needs image": "needs --image",
    "needs ip_adapter_image": "needs --ip-adapter-image",
}
"""Parts of the SDK's errors that name its arguments, and the words for the command line."""


def message(error: Exception) -> str:
    """The text of ``error`` for the command line."""
    text = str(error)
    if isinstance(error, DarkroomError) and error.violations:
        text = "; ".join(f"{_flag_of(each.field)}: {each.description}" for each in error.violations)
    for phrase, words in PHRASES.items():
        text = text.replace(phrase, words)
    if isinstance(error, ModelNotFound):
        text += _model_meant(text)
    return text


def _flag_of(field: str) -> str:
    """The flag of a field; of a part such as ``loras[0].scale``, that of the whole."""
    return _FLAGS.get(field) or _FLAGS.get(re.split(r"[\[.]", field)[0], field)


def meant(name: str, known: Iterable[str]) -> str:
    """``; did you mean NAME?`` for the closest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def flags_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The long flags of ``parser``."""
    # argparse has no public list of them.
    actions = parser._actions
    return {flag: each for each in actions for flag in each.option_strings if flag[:2] == "--"}


def _model_meant(text: str) -> str:
    found = re.search(r"no model '(.*)'; this server holds (.*)$", text)
    return meant(found[1], found[2].split(", ")) if found else ""
