"""One setting: its declaration, and the names of its flag, variable and key."""

import dataclasses
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

ENV_PREFIX = "DARKROOM_SERVE_"

REDACTED = "<redacted>"

CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)|(?<=[?&]password=)[^&\s]+")
"""User name and password in a URL."""

PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]*@|[?&]password=")


def without_credentials(text: str) -> str:
    """``text`` without the user name and the password of a URL in it."""
    return CREDENTIALS.sub(REDACTED, text)


def has_password(text: str) -> bool:
    """Whether a URL in ``text`` has a password."""
    return PASSWORD.search(text) is not None


@dataclass(frozen=True, slots=True)
class Setting:
    """The documentation of a field, in its annotation.

    ``choose`` says how to choose a value. ``default`` describes the default, if the value alone
    does not explain itself.
    """

    help: str
    choose: str = ""
    metavar: str = ""
    default: str = ""


@dataclass(frozen=True, slots=True)
class Option:
    """A declared setting: field ``name`` of section ``section``, with its bare ``type``."""

    section: str
    name: str
    type: Any
    default: Any
    setting: Setting

    @property
    def flag(self) -> str:
        """The flag: "--max-rows"."""
        return "--" + self.name.replace("_", "-")

    @property
    def env(self) -> str:
        """The environment variable: "DARKROOM_SERVE_MAX_ROWS"."""
        return ENV_PREFIX + self.name.upper()

    @property
    def key(self) -> str:
        """The key in a TOML file, with its table: "engine.max_rows"."""
        return f"{self.section}.{self.name}"

    @property
    def is_switch(self) -> bool:
        """Whether the setting is on or off, without a value."""
        return self.type is bool

    @property
    def is_list(self) -> bool:
        """Whether the setting may be given several times."""
        return get_origin(self.type) is tuple

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed values of an enumeration; empty for any other type."""
        if get_origin(self.type) is Literal:
            return tuple(map(str, get_args(self.type)))
        if isinstance(self.type, type) and issubclass(self.type, Enum):
            return tuple(str(member.value) for member in self.type)
        return ()

    @property
    def default_text(self) -> str:
        """The default, as shown in --help."""
        if self.setting.default:
            return self.setting.default
        if self.is_switch:
            return "on" if self.default else "off"
        return str(getattr(self.default, "value", self.default))


def options_of(tree: type) -> Iterator[Option]:
    """Yield every setting of a tree: a dataclass whose fields are dataclasses (sections)."""
    for section_name, section in get_type_hints(tree).items():
        defaults = section()
        hints = get_type_hints(section, include_extras=True)
        for field in dataclasses.fields(section):
            bare, *extras = get_args(hints[field.name])
            yield Option(
                section=section_name,
                name=field.name,
                type=_without_none(bare),
                default=getattr(defaults, field.name),
                setting=next(extra for extra in extras if isinstance(extra, Setting)),
            )


def _without_none(hint: Any) -> Any:
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    (rest,) = (arg for arg in get_args(hint) if arg is not types.NoneType)
    return get_args(rest)[0] if get_origin(rest) is Annotated else rest
