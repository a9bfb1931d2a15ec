"""Loads ``Settings`` from flags, environment and file; an error is one clear line."""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darkroom_server.core.errors import StartupError
from darkroom_server.settings.option import ENV_PREFIX, Option, options_of
from darkroom_server.settings.tree import Settings

CONFIG_ENV = f"{ENV_PREFIX}CONFIG"


@dataclass(frozen=True, slots=True)
class Given:
    """An unchecked value, and its source for error messages."""

    value: Any
    origin: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """The settings, and warnings about their sources."""

    settings: Settings
    warnings: tuple[str, ...]


def load_settings(
    flags: Mapping[str, Any], environ: Mapping[str, str], config: str | None = None
) -> Loaded:
    """Load settings by precedence: flag, environment variable, file, default.

    ``flags`` holds values by field name. ``config`` is the path of a TOML file; without it,
    ``DARKROOM_SERVE_CONFIG`` may name one. Raises ``StartupError``.
    """
    options = {option.name: option for option in options_of(Settings)}
    config = config or environ.get(CONFIG_ENV)
    given = _from_file(Path(config), options) if config else {}
    given |= _from_environment(environ, options)
    given |= {name: Given(value, options[name].flag) for name, value in flags.items()}
    return Loaded(_checked(given, options), tuple(_warnings(environ, options)))


def _from_file(path: Path, options: Mapping[str, Option]) -> dict[str, Given]:
    try:
        with path.open("rb") as file:
            tables = tomllib.load(file)
    except OSError as error:
        raise StartupError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StartupError(f"{path} is not TOML: {error}") from None
    by_key = {option.key: option for option in options.values()}
    sections = {option.section for option in options.values()}
    given = {}
    for section, table in tables.items():
        if section not in sections:
            raise StartupError(f"{path}: unknown key {section!r}{_hint(section, by_key)}")
        if not isinstance(table, dict):
            raise StartupError(f"{path}: {section!r} is a table; write [{section}] above its keys")
        for name, value in table.items():
            key = f"{section}.{name}"
            if key not in by_key:
                raise StartupError(f"{path}: unknown key {key!r}{_hint(key, by_key)}")
            given[name] = Given(value, f"{path}: {key}")
    return given


def _hint(key: str, by_key: Mapping[str, Option]) -> str:
    name = key.rpartition(".")[2]
    for option in by_key.values():
        if option.name == name.replace("-", "_"):
            return f"; did you mean {option.key!r}?"
    close = difflib.get_close_matches(key, [*by_key, *(o.section for o in by_key.values())], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _from_environment(
    environ: Mapping[str, str], options: Mapping[str, Option]
) -> dict[str, Given]:
    given = {}
    for option in options.values():
        # A compose file passes an unset variable as an empty one.
        if text := environ.get(option.env):
            value = [part.strip() for part in text.split(",")] if option.is_list else text
            given[option.name] = Given(value, option.env)
    return given


def _checked(given: Mapping[str, Given], options: Mapping[str, Option]) -> Settings:
    # Imported here: the import takes longer than all the rest of `--help`.
    from pydantic import TypeAdapter, ValidationError

    tree: dict[str, dict[str, Any]] = {}
    for name, one in given.items():
        tree.setdefault(options[name].section, {})[name] = one.value
    try:
        return TypeAdapter(Settings).validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][1])
        wrong = given[name]
        expected = _expected(options[name], first["msg"])
        raise StartupError(f"{wrong.origin}: {expected}, not {wrong.value!r}") from None


def _expected(option: Option, message: str) -> str:
    if option.choices:
        return f"must be one of {', '.join(option.choices)}"
    if "|" in option.setting.metavar:
        return f"must be {option.setting.metavar.replace('|', ', ')}"
    return message.split(",")[0].replace("Input should", "must")


def _warnings(environ: Mapping[str, str], options: Mapping[str, Option]) -> list[str]:
    known = {option.env: option for option in options.values()}
    unknown = [name for name in environ if name.startswith(ENV_PREFIX) and name not in known]
    return [
        f"{name} is not a setting and is ignored"
        + (
            f"; did you mean {close[0]}?"
            if (close := difflib.get_close_matches(name, known))
            else ""
        )
        for name in sorted(unknown)
        if name != CONFIG_ENV
    ]
