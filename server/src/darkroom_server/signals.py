"""How the server ends by a signal, wherever it runs."""

import os
import signal
from typing import NoReturn


def exit_by_signal(number: int) -> NoReturn:
    """End this process by a signal, at once.

    As process 1 of a container too, which outlives what has no handler: the status is then that of
    a shell, 128 and the number.
    """
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
    os._exit(128 + number)
