"""Loads ``Settings`` from flags, environment and file; an error is one clear line."""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from darkroom_server.core.errors import InvalidSettings, StartupError
from darkroom_server.settings.option import (
    ENV_PREFIX,
    Option,
    has_password,
    options_of,
    without_credentials,
)
from darkroom_server.settings.tree import Settings

CONFIG_ENV = f"{ENV_PREFIX}CONFIG"


@dataclass(frozen=True, slots=True)
class Given:
    """An unchecked value, and its source for error messages."""

    value: Any
    origin: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """The settings, warnings about their sources, and the source of each that was set, by name."""

    settings: Settings
    warnings: tuple[str, ...]
    origins: Mapping[str, str] = field(default_factory=dict)


def load_settings(
    flags: Mapping[str, Any], environ: Mapping[str, str], config: str | None = None
) -> Loaded:
    """Load settings by precedence: flag, environment variable, file, default.

    ``flags`` holds values by field name. ``config`` is the path of a TOML file; without it,
    ``DARKROOM_SERVE_CONFIG`` may name one. Raises ``StartupError`` if the file cannot be read, and
    ``InvalidSettings`` with all problems of all sources.
    """
    options = {option.name: option for option in options_of(Settings)}
    config = config or environ.get(CONFIG_ENV)
    problems: list[str] = []
    given = _from_file(Path(config), options, problems) if config else {}
    given |= _from_environment(environ, options)
    given |= {name: Given(value, options[name].flag) for name, value in flags.items()}
    if has_password(str(flags.get("ledger", ""))):
        problems.append(
            "--ledger: other users of this machine can read a password on the command line; use "
            "PGPASSFILE, PGPASSWORD or DARKROOM_SERVE_LEDGER"
        )
    settings = _checked(given, options, problems)
    origins = {name: one.origin for name, one in given.items()}
    return Loaded(settings, tuple(_warnings(environ, options)), origins)


def _from_file(path: Path, options: Mapping[str, Option], problems: list[str]) -> dict[str, Given]:
    """The values in the file; what is wrong with its keys is added to ``problems``."""
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
            problems.append(f"{path}: unknown key {section!r}{_hint(section, by_key)}")
            continue
        if not isinstance(table, dict):
            problems.append(f"{path}: {section!r} is a table; write [{section}] above its keys")
            continue
        for name, value in table.items():
            key = f"{section}.{name}"
            if key not in by_key:
                problems.append(f"{path}: unknown key {key!r}{_hint(key, by_key)}")
                continue
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


def _checked(
    given: Mapping[str, Given], options: Mapping[str, Option], problems: list[str]
) -> Settings:
    # Imported here: the import takes longer than all the rest of `--help`.
    from pydantic import TypeAdapter, ValidationError

    tree: dict[str, dict[str, Any]] = {}
    for name, one in given.items():
        tree.setdefault(options[name].section, {})[name] = one.value
    try:
        settings = TypeAdapter(Settings).validate_python(tree)
    except ValidationError as error:
        # A value of several types has an error for each of them: the first one will do.
        messages: dict[str, str] = {}
        for each in error.errors():
            messages.setdefault(str(each["loc"][1]), each["msg"])
        for name, message in messages.items():
            wrong, expected = given[name], _expected(options[name], message)
            value = without_credentials(repr(wrong.value))
            problems.append(f"{wrong.origin}: {expected}, not {value}")
        raise InvalidSettings(problems) from None
    if problems:
        raise InvalidSettings(problems)
    return settings


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
