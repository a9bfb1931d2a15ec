"""Runs whatever serves arrivals in a process of its own."""

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar

from bench.workload.arrivals import Answer, Arrivals
from bench.workload.requests import Request, mixed
from darkroom_server.core.model import ModelInfo
from darkroom_server.engine.main import die_with

MAX_BATCH_IMAGES = 8
"""Images that may share a batch, or a call of ``pipe()``."""

Found = TypeVar("Found")


class ArrivalServer(Protocol):
    """Serves arrivals; torch is always called on the same thread."""

    def serve(self, arrivals: Arrivals) -> list[Answer]:
        """Serve all of them; returns when the last image is encoded."""

    def batch_times(self) -> list[tuple[int, float]]:
        """Rows and seconds of each batch since the previous call, empty if not known."""

    def close(self) -> None:
        """Stop."""


@dataclass(frozen=True, slots=True)
class Report:
    """The answers of one run, and its batches as (rows, seconds).

    ``began`` is the start of the run in seconds of the monotonic clock.
    """

    answers: list[Answer]
    batch_times: list[tuple[int, float]]
    began: float


class Remote:
    """An ``ArrivalServer`` in a process of its own, which shares no threads and no caches.

    ``make`` is called in that process and must be picklable. It returns the server and, if known,
    the facts of its model.
    """

    def __init__(self, make: Callable[[], tuple[ArrivalServer, ModelInfo | None]]) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_work, args=(theirs, make), daemon=True)
        self._process.start()
        theirs.close()
        self.info: ModelInfo | None = self._receive()

    def serve(self, requests: Sequence[Request], callers: int | None = None) -> Report:
        """Serve ``requests`` by their arrivals, or in a closed loop of ``callers``."""
        self._connection.send((list(requests), callers))
        report: Report = self._receive()
        return report

    def warm_up(self) -> None:
        """Serve bursts of every size, so that no first call is measured."""
        for count in range(1, MAX_BATCH_IMAGES + 1):
            burst = [replace(r, steps=2, guidance_scale=7.5) for r in mixed(count, seed=count)]
            self.serve(burst, callers=count)

    def close(self) -> None:
        """End the process."""
        self._connection.send(None)
        self._process.join()

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            raise RuntimeError("a measured process died; its own error is above") from None


class ProcessFailed(RuntimeError):
    """Work in a process of its own did not come to its end."""


def in_fresh_process(work: Callable[..., Found], *arguments: Any) -> Found:
    """``work(*arguments)`` in a new process, which leaves nothing on the device."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_die_with_parent) as pool:
        return pool.submit(work, *arguments).result()


def yields_of_process(
    work: Callable[..., Iterator[Found]], *arguments: Any, seconds: float
) -> Iterator[Found]:
    """What ``work(*arguments)`` yields in a new process, as it comes.

    Raises ``ProcessFailed`` if it raises, if the process dies, or if it has not ended after
    ``seconds``; then the process is killed.
    """
    until = time.monotonic() + seconds
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    # Not a daemon, which could have no processes of its own.
    process = spawn.Process(target=_send_yields, args=(theirs, work, arguments))
    process.start()
    theirs.close()
    try:
        while True:
            remaining = until - time.monotonic()
            if remaining <= 0 or not ours.poll(remaining):
                raise ProcessFailed(f"not done after {seconds:.0f} s, and stopped")
            try:
                message: tuple[Found] | str | None = ours.recv()
            except EOFError:
                process.join()
                raise ProcessFailed(f"its process died with code {process.exitcode}") from None
            if message is None:
                process.join(max(0.0, until - time.monotonic()))
                return
            if isinstance(message, str):
                raise ProcessFailed(message)
            yield message[0]
    finally:
        process.kill()
        process.join()
        ours.close()


def _send_yields(
    connection: "Connection[Any, Any]",
    work: Callable[..., Iterator[Any]],
    arguments: tuple[Any, ...],
) -> None:
    _die_with_parent()
    try:
        for found in work(*arguments):
            connection.send((found,))
    except Exception as error:  # noqa: BLE001 - the other process raises it.
        traceback.print_exc()
        connection.send(f"{type(error).__name__}: {error}")
    else:
        connection.send(None)


def _die_with_parent() -> None:
    """If the benchmark is killed, this process must not go on generating (PDEATHSIG)."""
    if (parent := multiprocessing.parent_process()) and parent.pid:
        die_with(parent.pid)


def _work(
    connection: "Connection[Any, Any]",
    make: Callable[[], tuple[ArrivalServer, ModelInfo | None]],
) -> None:
    _die_with_parent()
    server, info = make()
    connection.send(info)
    while (wanted := connection.recv()) is not None:
        requests, callers = wanted
        began = time.monotonic()
        answers = server.serve(Arrivals(requests, callers))
        connection.send(Report(answers, server.batch_times(), began))
    server.close()
