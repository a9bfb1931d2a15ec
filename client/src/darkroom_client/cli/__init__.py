"""The command line: ``darkroom generate``, ``models``, ``status`` and so on."""

import importlib.util
import logging
import os
import sys
from collections.abc import Sequence

from darkroom_client._errors import DarkroomError
from darkroom_client.cli._arguments import parse
from darkroom_client.cli._exit_codes import FILE, INTERRUPTED, PIPE, USAGE, exit_code
from darkroom_client.cli._flags import message

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; if unset, ``argv`` is ``sys.argv[1:]``."""
    # The commands print what matters themselves; without a handler Python prints warnings again.
    logging.getLogger("darkroom_client").addHandler(logging.NullHandler())
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader closed the pipe, as `head` does. Discard the buffered output, or Python prints
        # an error for it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE


def _run(argv: Sequence[str] | None) -> int:
    arguments = parse(argv)
    if arguments.needs_rich and importlib.util.find_spec("rich") is None:
        return _fail("this command needs rich: pip install 'darkroom-client[cli]'", USAGE)
    try:
        code: int = arguments.run(arguments)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except DarkroomError as error:
        return _fail(message(error), exit_code(error))
    except BrokenPipeError:
        raise
    except OSError as error:
        return _fail(message(error), FILE)
    except ValueError as error:
        return _fail(message(error), USAGE)
    return code


def _fail(text: str, code: int) -> int:
    print(f"darkroom: {text}", file=sys.stderr)
    return code
