"""What a program starts ends with it, however it ends."""

import shutil
import signal
from types import FrameType


def exit_on_sigterm() -> None:
    """Let SIGTERM end this program as Ctrl-C does: ``finally`` blocks stop what it started."""
    signal.signal(signal.SIGTERM, _exit)


def _exit(number: int, _: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # A second one must not end the cleaning up.
    raise SystemExit(128 + number)


def dying_with_parent(number: signal.Signals, *options: str) -> list[str]:
    """What to put before a command that gets a signal when the thread that started it has died.

    PDEATHSIG, set by ``setpriv`` with ``options``; nothing if that is not installed.
    """
    if shutil.which("setpriv") is None:
        return []
    return ["setpriv", "--pdeathsig", number.name.removeprefix("SIG"), *options, "--"]
