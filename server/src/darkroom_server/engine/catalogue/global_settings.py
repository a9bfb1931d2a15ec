"""Keeps what the libraries change for the whole process away from batches, while a model is read.

diffusers and transformers set torch's default dtype while they make a module. A batch on another
thread would compute in that dtype. So the reading thread lets the loop pause for that time, which
is short: weights are read afterwards.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

MOST_SECONDS = 60.0
"""A pause never takes longer: the reading thread may be stuck."""


@dataclass(frozen=True, slots=True)
class LoopPaused:
    """Asks the loop to run nothing until ``over``."""

    granted: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)

    def hold(self) -> None:
        """Let the reading thread go on, and wait until the pause is over; on the loop's thread."""
        self.granted.set()
        self.over.wait(MOST_SECONDS)


class _Pauses(threading.local):
    """The pause of this thread, and how to ask for one; None on threads that need none."""

    ask: Callable[[LoopPaused], None] | None = None
    current: LoopPaused | None = None
    usual: torch.dtype | None = None


_pauses = _Pauses()
_alone = threading.Lock()
"""Held during a pause: two models may be read at once."""

_set_default_dtype = torch.set_default_dtype


def _set_dtype_alone(d: torch.dtype, /) -> None:
    """``torch.set_default_dtype``, with the loop paused until the usual dtype is set again."""
    ask = _pauses.ask
    if ask is not None and _pauses.current is None:
        _alone.acquire()
        _pauses.current, _pauses.usual = LoopPaused(), torch.get_default_dtype()
        ask(_pauses.current)
        _pauses.current.granted.wait()
        _set_default_dtype(d)
        return
    _set_default_dtype(d)
    if ask is not None and d == _pauses.usual:
        _end()


def _end() -> None:
    pause, _pauses.current = _pauses.current, None
    if pause is not None:
        pause.over.set()
        _alone.release()


@contextmanager
def exclusive_settings(ask: Callable[[LoopPaused], None]) -> Iterator[None]:
    """Pause the loop whenever this thread changes torch's default dtype.

    ``ask`` passes the wish to the loop's thread, which calls ``LoopPaused.hold``.
    """
    torch.set_default_dtype = _set_dtype_alone
    _pauses.ask = ask
    try:
        yield
    finally:
        _pauses.ask = None
        if _pauses.current is not None and _pauses.usual is not None:
            _set_default_dtype(_pauses.usual)
        _end()
