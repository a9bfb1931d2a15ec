"""Requests with a prompt of its own for each text encoder."""

from collections.abc import Mapping
from typing import Any

from darkroom_server.core.job import Job


def is_cut(job: Job, pipeline: Any, windows: Mapping[str, int]) -> bool:
    """Whether no text encoder reads a prompt of ``job`` to its end.

    ``windows`` are the tokens that an encoder reads, by the name of its tokenizer in ``pipeline``.
    The encoder of ``tokenizer_2`` gets ``prompt_2``, or ``prompt`` if that is empty.
    """
    whole: dict[str, bool] = {}
    for name, window in windows.items():
        tokenizer = getattr(pipeline, name)
        for kind in ("prompt", "negative_prompt"):
            text = getattr(job, name.replace("tokenizer", kind)) or getattr(job, kind)
            fits = len(tokenizer(text, verbose=False).input_ids) <= window
            whole[text] = whole.get(text, False) or fits
    return not all(whole.values())
