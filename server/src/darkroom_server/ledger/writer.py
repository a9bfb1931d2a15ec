"""One thread that owns a database connection, and commits operations of many callers at once."""

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from darkroom_server.core.errors import DarkroomError, LedgerUnreachable

MAX_GROUP = 256
"""Operations of one commit."""

RETRY_SECONDS = 1.0

T = TypeVar("T")
Operation = Callable[[sqlite3.Connection], Any]
_Waiting = tuple[Operation, "asyncio.Future[Any]"]


class Writer:
    """Runs operations on ``connection``, in the order in which they come, off the event loop.

    A commit waits for the disk, so what comes meanwhile shares the next one. An operation that
    raises a ``DarkroomError`` must have written nothing; the others of its group are committed.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="ledger", daemon=True)
        self._thread.start()

    async def run(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        """What ``operation`` returns, once it is committed; raises what it raises.

        Raises ``LedgerUnreachable`` if the database cannot be read or written.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        self._queue.put((operation, future))
        return await future

    async def close(self) -> None:
        """Run everything that came before, and close the connection."""
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    def _work(self) -> None:
        running = True
        while running:
            group: list[_Waiting] = []
            waiting = self._queue.get()
            while waiting is not None:
                group.append(waiting)
                if len(group) == MAX_GROUP:
                    break
                try:
                    waiting = self._queue.get_nowait()
                except queue.Empty:
                    break
            running = waiting is not None
            if group:
                self._run(group)
        self._connection.close()

    def _run(self, group: Sequence[_Waiting]) -> None:
        """Commit a group, or each operation alone if the group cannot be committed."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            self._deliver(group, [_unreachable(error)] * len(group))
            return
        try:
            outcomes = [self._attempt(operation) for operation, _ in group]
            self._connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - it belongs to the callers, on the event loop.
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            if len(group) > 1:
                for waiting in group:
                    self._run([waiting])
                return
            outcomes = [_unreachable(error) if isinstance(error, sqlite3.Error) else error]
        self._deliver(group, outcomes)

    def _attempt(self, operation: Operation) -> Any:
        try:
            return operation(self._connection)
        except DarkroomError as rejection:
            return rejection

    def _deliver(self, group: Sequence[_Waiting], outcomes: Sequence[Any]) -> None:
        with suppress(RuntimeError):  # The loop is closed.
            self._loop.call_soon_threadsafe(_resolve, group, outcomes)


def _resolve(group: Sequence[_Waiting], outcomes: Sequence[Any]) -> None:
    for (_, future), outcome in zip(group, outcomes, strict=True):
        if future.done():
            continue
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


def _unreachable(error: sqlite3.Error) -> Exception:
    """What the callers get; an error of ours and not of the database stays what it is."""
    if isinstance(error, sqlite3.ProgrammingError | sqlite3.IntegrityError):
        return error
    return LedgerUnreachable(
        f"the ledger cannot be written: {error}; try again in {RETRY_SECONDS:.0f} s", RETRY_SECONDS
    )
