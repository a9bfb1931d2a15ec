"""Ends the process by a signal."""

import logging
import os
import signal
from typing import NoReturn


def exit_by_signal(number: int) -> NoReturn:
    """End this process with signal ``number``.

    Process 1 of a container survives a signal with the default action. It then exits with
    128 + ``number``, as a shell does.
    """
    logging.shutdown()  # Writes the queued lines, for a limited time.
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
    os._exit(128 + number)
