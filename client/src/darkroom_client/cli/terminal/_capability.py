"""Which pictures the terminal can show: ask it, and read its answer."""

import os
import re
import sys
import time
from enum import StrEnum

ANSWER_SECONDS = 0.3
"""A terminal answers within milliseconds; over a slow connection the picture is of half blocks."""

# A kitty picture of one pixel, the name of the terminal, and its features. Every terminal answers
# the last one: after that answer there is nothing to wait for.
QUERY = b"\x1b_Gi=31,s=1,v=1,a=q,t=d,f=24;AAAA\x1b\\\x1b[>q\x1b[c"

_FEATURES = re.compile(rb"\x1b\[\?([0-9;]*)c")
_SIXEL = b"4"


class Graphics(StrEnum):
    """How a terminal shows a picture."""

    KITTY = "kitty"
    ITERM = "iterm"
    SIXEL = "sixel"
    HALF_BLOCKS = "half blocks"


def graphics() -> Graphics:
    """The best way that the terminal offers; half blocks if it does not answer."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return Graphics.HALF_BLOCKS
    return read_answer(_ask(sys.stdin.fileno(), sys.stdout.fileno()))


def read_answer(answer: bytes) -> Graphics:
    """The best way according to the answer to ``QUERY``."""
    if b"\x1b_Gi=31;OK" in answer:
        return Graphics.KITTY
    if b"\x1bP>|iTerm2" in answer:
        return Graphics.ITERM
    features = _FEATURES.search(answer)
    if features is not None and _SIXEL in features[1].split(b";"):
        return Graphics.SIXEL
    return Graphics.HALF_BLOCKS


def _ask(keyboard: int, screen: int) -> bytes:
    try:
        import select
        import termios
        import tty
    except ImportError:
        return b""  # Windows
    before = termios.tcgetattr(keyboard)
    answer = b""
    try:
        # Without it the answer would show on the screen, and wait for a line's end.
        tty.setcbreak(keyboard, termios.TCSANOW)
        os.write(screen, QUERY)
        until = time.monotonic() + ANSWER_SECONDS
        while not _FEATURES.search(answer):
            wait = until - time.monotonic()
            if wait <= 0 or not select.select([keyboard], [], [], wait)[0]:
                break
            answer += os.read(keyboard, 1024)
    finally:
        termios.tcsetattr(keyboard, termios.TCSANOW, before)
    return answer
