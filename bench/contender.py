"""Who draws the workload: something that serves arrivals, in a process of its own."""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, Protocol

from bench.arrivals import Arrivals, Drawn
from bench.workload import Request, mixed
from darkroom_server.core.model import ModelInfo
from darkroom_server.engine.main import die_with

WIDEST = 8
"""Images that may share a pass, or a call of ``pipe()``."""


class Contender(Protocol):
    """Serves arrivals; one thread of its process calls torch, always the same."""

    def draw(self, arrivals: Arrivals) -> list[Drawn]:
        """Draw everything; returns when the last image is encoded."""

    def passes(self) -> list[tuple[int, float]]:
        """Rows and seconds of each pass since the last time, where it knows them."""

    def close(self) -> None:
        """Stop."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a contender drew, and its passes as (rows, seconds).

    It ``began`` at that moment of the monotonic clock.
    """

    drawn: list[Drawn]
    passes: list[tuple[int, float]]
    began: float


class Remote:
    """A contender in a process of its own, so that none meets another's threads or caches.

    ``make`` is called in that process, and must be picklable; it returns the contender and what it
    knows of its model, None if nothing.
    """

    def __init__(self, make: Callable[[], tuple[Contender, ModelInfo | None]]) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_work, args=(theirs, make), daemon=True)
        self._process.start()
        theirs.close()
        self.info: ModelInfo | None = self._receive()

    def draw(self, requests: Sequence[Request], callers: int | None = None) -> Report:
        """Let it draw ``requests``: by their arrivals, or in a closed loop of ``callers``."""
        self._connection.send((list(requests), callers))
        report: Report = self._receive()
        return report

    def warm_up(self) -> None:
        """Bursts of every size, so that no first call is measured."""
        for count in range(1, WIDEST + 1):
            burst = [replace(r, steps=2, guidance_scale=7.5) for r in mixed(count, seed=count)]
            self.draw(burst, callers=count)

    def close(self) -> None:
        """End the process."""
        self._connection.send(None)
        self._process.join()

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            raise RuntimeError("a contender's process died; its own error is above") from None


def _work(
    connection: "Connection[Any, Any]",
    make: Callable[[], tuple[Contender, ModelInfo | None]],
) -> None:
    # A bench that is killed in the middle of a loop must not leave one behind that draws on.
    if (parent := multiprocessing.parent_process()) and parent.pid:
        die_with(parent.pid)
    contender, info = make()
    connection.send(info)
    while (wanted := connection.recv()) is not None:
        requests, callers = wanted
        began = time.monotonic()
        drawn = contender.draw(Arrivals(requests, callers))
        connection.send(Report(drawn, contender.passes(), began))
    contender.close()
