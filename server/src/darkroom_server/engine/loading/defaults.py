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
    """Denoising steps, and classifier-free guidance, for requests that set none."""

    steps: int
    guidance_scale: float


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
    if not isinstance(given, dict) or not given.keys() <= {"steps", "guidance_scale"}:
        raise StartupError(
            f"model {source.location!r}: its {FILE} may hold steps and guidance_scale, and nothing "
            "else"
        )
    defaults = replace(family, **given)
    if type(defaults.steps) is not int or not 1 <= defaults.steps <= 150:
        raise StartupError(f"model {source.location!r}: steps in its {FILE} must be 1 to 150")
    if type(defaults.guidance_scale) not in (int, float) or not 0 <= defaults.guidance_scale <= 50:
        raise StartupError(
            f"model {source.location!r}: guidance_scale in its {FILE} must be 0 to 50"
        )
    return defaults
