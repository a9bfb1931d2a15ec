"""``serve --print-config``: the settings in effect, as a TOML file, and where each comes from."""

import json
from collections.abc import Mapping
from enum import Enum
from typing import Any

from darkroom_server.settings.load import Loaded
from darkroom_server.settings.option import REDACTED, Option, options_of, without_credentials
from darkroom_server.settings.tree import Settings

SECRET_VARIABLES = ("HF_TOKEN",)
"""Variables that ``serve`` reads, and whose values are printed nowhere."""


def effective_toml(loaded: Loaded, environ: Mapping[str, str]) -> str:
    """The page: every setting, with its source as a comment; unset ones are comments."""
    lines = [f"# {name} = {REDACTED}" for name in SECRET_VARIABLES if environ.get(name)]
    section = ""
    for option in options_of(Settings):
        if option.section != section:
            section = option.section
            lines += ["", f"[{section}]"]
        lines.append(_line(option, loaded))
    return "\n".join(lines).lstrip() + "\n"


def _line(option: Option, loaded: Loaded) -> str:
    value = getattr(getattr(loaded.settings, option.section), option.name)
    source = loaded.origins.get(option.name, "default")
    if value is None or value == ():
        return f"# {option.name}: {option.default_text}"
    return f"{option.name} = {_toml(value)}  # {source}"


def _toml(value: Any) -> str:
    match value:
        case tuple():
            return f"[{', '.join(map(_toml, value))}]"
        case bool():
            return "true" if value else "false"
        case Enum():
            return _toml(value.value)
        case str():
            # A JSON string is a TOML string, except for DEL, which TOML wants escaped.
            text = json.dumps(without_credentials(value), ensure_ascii=False)
            return text.replace("\x7f", "\\u007f")
    return repr(value)
