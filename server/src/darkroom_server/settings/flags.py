"""The flags of ``darkroom-server serve``, built from the declarations."""

import argparse
import sys
from typing import Any, NoReturn

from darkroom_server.settings.option import options_of
from darkroom_server.settings.tree import Settings

PROGRAM = "darkroom-server"


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Print ``message`` and exit with code 2."""
        print(f"{PROGRAM}: error: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag per setting. Values stay text; ``settings.load`` checks them."""
    sections: dict[str, argparse._ArgumentGroup] = {}
    for option in options_of(Settings):
        if option.section not in sections:
            sections[option.section] = parser.add_argument_group(option.section)
        setting = option.setting
        how: dict[str, Any] = {
            "dest": option.name,
            "default": argparse.SUPPRESS,
            "help": f"{setting.help} (default: {option.default_text})".replace("%", "%%"),
        }
        if option.is_switch:
            how["action"] = argparse.BooleanOptionalAction
        else:
            how["metavar"] = setting.metavar or "|".join(option.choices)
            how["action"] = "append" if option.is_list else "store"
        sections[option.section].add_argument(option.flag, **how)
