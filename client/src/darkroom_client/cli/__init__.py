"""The command line: ``darkroom generate``, ``models``, ``status`` and so on."""

import importlib.util
import os
import sys
from collections.abc import Sequence

from darkroom_client._errors import DarkroomError
from darkroom_client.cli._arguments import parse
from darkroom_client.cli._exit_codes import FILE, INTERRUPTED, PIPE, USAGE, exit_code

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; ``argv`` is ``sys.argv[1:]`` where unset."""
    arguments = parse(argv)
    if importlib.util.find_spec("rich") is None:
        return _complain("this command needs rich: pip install 'darkroom-client[cli]'", USAGE)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except DarkroomError as error:
        return _complain(str(error), exit_code(error))
    except BrokenPipeError:
        # Whoever read the output has enough, as `head` does. What is buffered goes nowhere, or
        # Python would complain about it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE
    except OSError as error:
        return _complain(str(error), FILE)
    except ValueError as error:
        return _complain(str(error), USAGE)
    return code


def _complain(message: str, code: int) -> int:
    print(f"darkroom: {message}", file=sys.stderr)
    return code
