"""The names of image files: the prompt's words and the seed."""

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

_LONGEST = 60


def slug(prompt: str) -> str:
    """The prompt's words in a-z, 0-9 and -, at most 60 characters, cut between words."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    name = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
    if len(name) > _LONGEST:
        name = name[: _LONGEST + 1].rpartition("-")[0] or name[:_LONGEST]
    return name or "image"


def distinct(paths: Iterable[Path]) -> list[Path]:
    """Add -2, -3 … to repeated names in ``paths``: long prompts may share a slug."""
    seen: dict[Path, int] = {}
    result = []
    for path in paths:
        seen[path] = times = seen.get(path, 0) + 1
        result.append(path if times == 1 else path.with_name(f"{path.stem}-{times}{path.suffix}"))
    return result
