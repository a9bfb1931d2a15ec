"""``darkroom completion``: a script for the shell."""

import argparse

from darkroom_client.cli._completion import script


def run(arguments: argparse.Namespace) -> int:
    """Print the script."""
    print(script(arguments.shell, arguments.commands), end="")
    return 0
