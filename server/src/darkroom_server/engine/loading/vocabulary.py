"""Whether a tokenizer's folder has its vocabulary."""

import json
from pathlib import Path


def has_vocabulary(tokenizer: Path) -> bool:
    """Whether the folder ``tokenizer`` has the files of a tokenizer's vocabulary."""
    config = tokenizer / "tokenizer_config.json"
    if config.is_file():
        # Its tokens are the bytes.
        kind = json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class")
        if kind == "ByT5Tokenizer":
            return True
    single = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.txt")
    if any((tokenizer / name).is_file() for name in single):
        return True
    return all((tokenizer / name).is_file() for name in ("vocab.json", "merges.txt"))
