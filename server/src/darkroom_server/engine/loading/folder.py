"""What a pipeline's folder must hold, looked at before anything of it is loaded."""

import json
from pathlib import Path
from typing import Any

from darkroom_server.core.errors import StartupError

SUPPORTED = "StableDiffusionPipeline"
INDEX = "model_index.json"

PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def read_index(folder: Path, name: str) -> dict[str, Any]:
    """The index of the pipeline in ``folder``; ``name`` is what the operator calls the model.

    Raises ``StartupError`` where it is no index of a pipeline that is supported.
    """
    file = folder / INDEX
    if not file.is_file():
        raise StartupError(
            f"model folder {name!r} has no {INDEX}: give the folder of a pipeline, as diffusers "
            "saves it"
        )
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        index = None
    if not isinstance(index, dict):
        raise StartupError(f"model {name!r}: its {INDEX} is damaged; copy or download it again")
    kind = index.get("_class_name")
    if kind != SUPPORTED:
        raise StartupError(
            f"model {name!r} is a {kind or 'pipeline without a class'}, which is not supported; "
            f"Darkroom serves {SUPPORTED} models"
        )
    return index


def check_weights(folder: Path, part: str, name: str) -> None:
    """Raise ``StartupError`` where ``part`` has no weights that Darkroom reads."""
    files = list((folder / part).glob("*"))
    if any(file.suffix == ".safetensors" for file in files):
        return
    if any(file.suffix in PICKLES for file in files):
        raise StartupError(
            f"model {name!r}: its {part} has weights in pickle files only, which can run code and "
            "are not read; convert them to safetensors"
        )
    raise StartupError(f"model {name!r} has no weights of its {part}; copy or download it again")


def check_tokenizer(folder: Path, name: str) -> None:
    """Raise ``StartupError`` where there is no vocabulary: an empty one would be made up."""
    tokenizer = folder / "tokenizer"
    whole = (tokenizer / "tokenizer.json").is_file()
    if not whole and not all((tokenizer / f).is_file() for f in ("vocab.json", "merges.txt")):
        raise StartupError(
            f"model {name!r} has no vocabulary in its tokenizer; copy or download it again"
        )


def variant_of(folder: Path, part: str, variant: str | None) -> str | None:
    """``variant`` where ``part`` has files of it, as diffusers chooses it for each part."""
    if variant and any(f".{variant}." in file.name for file in (folder / part).glob("*")):
        return variant
    return None
