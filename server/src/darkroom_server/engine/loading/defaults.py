"""Defaults of a model's unset request fields: from its folder, or from its family."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from darkroom_server.core.engine_config import ModelSource
from darkroom_server.core.errors import StartupError

FILE = "darkroom.json"
"""Beside ``model_index.json``; the only file in a folder that is not diffusers' own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """Denoising steps, guidance and size for requests that set none.

    ``size`` is the width and the height in pixels, None for what the model was trained at.
    """

    steps: int
    guidance_scale: float
    true_cfg_scale: float = 1.0
    size: int | None = None


BOUNDS: dict[str, tuple[type, float, float]] = {
    "steps": (int, 1, 150),
    "guidance_scale": (float, 0, 50),
    "true_cfg_scale": (float, 0, 50),
    "size": (int, 16, 8192),
}
"""What the file may hold: whole numbers or any, and their bounds."""


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
        *names, last = BOUNDS
        raise StartupError(
            f"model {source.location!r}: its {FILE} may hold {', '.join(names)} and {last}, and "
            "nothing else"
        )
    for name, value in given.items():
        kind, least, most = BOUNDS[name]
        if type(value) not in (int, kind) or not least <= value <= most:
            raise StartupError(
                f"model {source.location!r}: {name} in its {FILE} must be {least} to {most}"
            )
    return replace(family, **given)
