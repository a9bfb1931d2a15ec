"""Defaults of a model's unset request fields: from its folder, or from its family."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from darkroom_server.core.engine_config import ModelSource
from darkroom_server.core.errors import StartupError

FILE = "darkroom.json"
"""Beside ``model_index.json``; the only file in a folder that is not diffusers' own."""

BOUNDS: dict[str, tuple[tuple[type, ...], int, int]] = {
    "steps": ((int,), 1, 150),
    "guidance_scale": ((int, float), 0, 50),
    "true_cfg_scale": ((int, float), 0, 50),
    "size": ((int,), 8, 8192),
}
"""What the file may hold: the types of a value, its least and its greatest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What requests that set nothing get.

    ``size`` is the width and height in pixels, None for the size that the model was trained at.
    ``max_sequence_length`` is None if the model does not take it.
    """

    steps: int
    guidance_scale: float
    size: int | None = None
    true_cfg_scale: float = 1.0
    max_sequence_length: int | None = None


def read_defaults(source: ModelSource, family: Defaults) -> Defaults:
    """The defaults of a local folder's ``darkroom.json``; the ``family``'s if it sets none.

    Raises ``StartupError``.
    """
    file = Path(source.location).expanduser() / FILE
    if not file.is_file():
        return family
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StartupError(f"model {source.location!r}: its {FILE} is not JSON: {error}") from None
    if not isinstance(given, dict) or not given.keys() <= BOUNDS.keys():
        raise StartupError(
            f"model {source.location!r}: its {FILE} may hold {', '.join(BOUNDS)}, and nothing else"
        )
    for name, value in given.items():
        types, least, most = BOUNDS[name]
        if type(value) not in types or not least <= value <= most:
            raise StartupError(
                f"model {source.location!r}: {name} in its {FILE} must be {least} to {most}"
            )
    return replace(family, **given)
