"""Work on the loop's thread in slices, with batches between them."""

import contextvars
from collections.abc import Callable
from typing import Any

import greenlet


class _Slices(greenlet.greenlet):
    """A greenlet that ``pause`` suspends."""


class SlicedWork:
    """One function that calls ``pause``, from pause to pause.

    It must not pause while it changes a state of the thread, such as torch's autocast.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        self._slices = _Slices(work)
        # Otherwise the values that structlog has bound would be missing in it.
        self._slices.gr_context = contextvars.copy_context()
        self._result: Any = None

    def run(self) -> bool:
        """Run to the next pause; True once the function has returned. Raises what it raises."""
        # Its parent is what runs now, which need not be what made it.
        self._slices.parent = greenlet.getcurrent()
        self._result = self._slices.switch()
        return bool(self._slices.dead)

    @property
    def result(self) -> Any:
        """What the function returned."""
        return self._result


def pause() -> None:
    """Let batches run, if this is part of a ``SlicedWork``; else nothing happens."""
    current = greenlet.getcurrent()
    if isinstance(current, _Slices) and current.parent is not None:
        current.parent.switch()


def between_batches(read: Callable[..., float]) -> Callable[..., float]:
    """``read``, with a pause before each call."""

    def paused(*arguments: Any) -> float:
        pause()
        return read(*arguments)

    return paused
