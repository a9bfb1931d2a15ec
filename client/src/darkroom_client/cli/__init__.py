"""The command line: ``darkroom generate``, ``models``, ``status`` and so on."""

import importlib.util
import sys
from collections.abc import Sequence

from darkroom_client._errors import DarkroomError
from darkroom_client.cli._arguments import parse
from darkroom_client.cli._exit_codes import FILE, INTERRUPTED, USAGE, exit_code

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; ``argv`` is ``sys.argv[1:]`` where unset."""
    arguments = parse(argv)
    if importlib.util.find_spec("rich") is None:
        return _complain("this command needs rich: pip install 'darkroom-client[cli]'", USAGE)
    try:
        code: int = arguments.run(arguments)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except DarkroomError as error:
        return _complain(str(error), exit_code(error))
    except OSError as error:
        return _complain(str(error), FILE)
    except ValueError as error:
        return _complain(str(error), USAGE)
    return code


def _complain(message: str, code: int) -> int:
    print(f"darkroom: {message}", file=sys.stderr)
    return code
