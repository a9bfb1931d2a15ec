"""Checks of a pipeline's folder, before anything of it is loaded."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from darkroom_server.core.errors import StartupError
from darkroom_server.engine.families.base import Family
from darkroom_server.engine.families.registry import family_named

INDEX = "model_index.json"

PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def read_index(folder: Path, name: str) -> tuple[type[Family], dict[str, Any]]:
    """The family of the pipeline in ``folder``, and its index.

    ``name`` is what the operator calls the model. Raises ``StartupError`` if the index is missing,
    damaged, or of a class that cannot be served.
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
    if not kind:
        raise StartupError(f"model {name!r}: its {INDEX} names no class; copy or download it again")
    return family_named(str(kind), index, name), index


def absent_parts(family: type[Family], index: Mapping[str, Any]) -> dict[str, None]:
    """The dispensable components that the folder of ``index`` does without, as arguments."""
    return dict.fromkeys(part for part in family.dispensable if not (index.get(part) or [None])[0])


def check_weights(folder: Path, part: str, name: str) -> None:
    """Raise ``StartupError`` if ``part`` has no weights that Darkroom reads."""
    files = list((folder / part).glob("*"))
    if any(file.suffix == ".safetensors" for file in files):
        return
    if any(file.suffix in PICKLES for file in files):
        raise StartupError(
            f"model {name!r}: its {part} has weights in pickle files only, which can run code and "
            "are not read; convert them to safetensors"
        )
    raise StartupError(f"model {name!r} has no weights of its {part}; copy or download it again")


def variant_of(folder: Path, part: str, variant: str | None) -> str | None:
    """``variant`` if ``part`` has files of it, else None, as diffusers decides for each part."""
    if variant and any(f".{variant}." in file.name for file in (folder / part).glob("*")):
        return variant
    return None
