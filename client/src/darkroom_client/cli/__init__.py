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
    """Run one command and return its exit code; if unset, ``argv`` is ``sys.argv[1:]``."""
    arguments = parse(argv)
    if importlib.util.find_spec("rich") is None:
        return _fail("this command needs rich: pip install 'darkroom-client[cli]'", USAGE)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except DarkroomError as error:
        return _fail(str(error), exit_code(error))
    except BrokenPipeError:
        # The reader closed the pipe, as `head` does. Discard the buffered output, or Python prints
        # an error for it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE
    except OSError as error:
        return _fail(str(error), FILE)
    except ValueError as error:
        return _fail(str(error), USAGE)
    return code


def _fail(message: str, code: int) -> int:
    print(f"darkroom: {message}", file=sys.stderr)
    return code
