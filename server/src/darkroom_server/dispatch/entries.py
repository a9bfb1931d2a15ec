"""This server's jobs in the ledger: what is written of them, in turn, until it is written."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import structlog

from darkroom_server.core.errors import DarkroomError, Failure, LedgerUnreachable
from darkroom_server.core.ledger import (
    Begun,
    Draft,
    Entry,
    Hold,
    Key,
    Ledger,
    Models,
    SharedLedger,
    Standing,
)
from darkroom_server.dispatch.jobs.job import ActiveJob
from darkroom_server.dispatch.jobs.outcomes import JobOutcome

log = structlog.get_logger(__name__)

RETRY_SECONDS = 1.0
"""Until what could not be written is tried again."""

RENEW_SECONDS = 60.0
"""Between two notes that this server lives; each also deletes entries that ended long ago."""

SETTLE_SECONDS = 5.0
"""The most that a caller waits until what it asked for is written."""

CLOSE_SECONDS = 10.0
"""For the last writes of a server that stops."""

STANDINGS = {
    JobOutcome.FINISHED: Standing.FINISHED,
    JobOutcome.FAILED: Standing.FAILED,
    JobOutcome.EXPIRED: Standing.EXPIRED,
    JobOutcome.CANCELLED: Standing.CANCELLED,
}

T = TypeVar("T")


class RunsElsewhere(Exception):
    """The job that was to begin here is in the shared ledger already: another server has it.

    ``entry``: its standing.
    """

    def __init__(self, entry: Entry) -> None:
        super().__init__(f"another server has {entry.key.request_id!r}")
        self.entry = entry


class LedgerObserver(Protocol):
    """Receives what the ledger does, on the event loop; no method blocks or raises."""

    def ledger_called(self, op: str, seconds: float) -> None:
        """An operation was answered, or failed, after ``seconds``."""

    def set_reachable(self, reachable: bool) -> None:
        """The ledger can be read and written from now on, or not."""

    def jobs_reclaimed(self, cause: str, jobs: int) -> None:
        """Jobs that an earlier server accepted are this one's now."""


class JobEntry:
    """The entry of a job, as this server last read it.

    ``hold`` is None until the entry is written. Each write waits for ``last``, the one before, so
    that the end of a job never comes before its beginning. ``calls_at`` as of ``Entry``.
    ``plain``: this server accepted it and runs it, and only calls here follow it, so the entry is
    there to be counted, and is deleted at its end.
    """

    def __init__(self, key: Key, hold: Hold | None = None, *, plain: bool = False) -> None:
        self.key = key
        self.hold = hold
        self.plain = plain
        self.calls_at: int | None = None
        self.last: asyncio.Task[None] | None = None


class LedgerEntries:
    """Writes into ``ledger`` which jobs this server accepted, which of them run, and how they end.

    Callers await the beginnings. Everything else is tried until it is written: what runs does not
    wait for the ledger. ``durable``: entries outlive this server. ``on_reachable`` is called when
    the ledger can be read and written again, and when it no longer can. ``shared``: the ledger, if
    other servers have it open too. ``failures`` counts the operations that may have been done or
    not.
    """

    def __init__(self, ledger: Ledger, observer: LedgerObserver) -> None:
        self.durable = ledger.durable
        self.failures = 0
        self.shared = ledger if isinstance(ledger, SharedLedger) else None
        self._ledger = ledger
        self._observer = observer
        self.on_reachable: Callable[[bool], None] = lambda _: None
        self._away = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._renewal: asyncio.Task[None] | None = None

    async def open(self) -> list[Entry]:
        """Open the ledger; returns the entries of earlier servers. Raises ``StartupError``."""
        lost = await self._ledger.open()
        entries = await self.mine()
        queued = sum(entry.standing is Standing.QUEUED for entry in entries)
        self._observer.set_reachable(True)
        self._observer.jobs_reclaimed("server_died", lost)
        self._observer.jobs_reclaimed("queued", max(0, queued - lost))
        if self.durable:
            self._renewal = asyncio.create_task(self._renew())
        return entries

    async def close(self) -> None:
        """Write what is under way, for a limited time, and close the ledger."""
        if self._renewal is not None:
            self._renewal.cancel()
        if self._tasks:
            _, unwritten = await asyncio.wait(self._tasks, timeout=CLOSE_SECONDS)
            for task in unwritten:
                task.cancel()
            if unwritten:
                log.error("the ledger lacks the last changes", changes=len(unwritten))
        await self._ledger.close()

    # One job.

    def begin(self, active: ActiveJob, draft: Draft) -> "asyncio.Task[None]":
        """Write that a job was accepted; the result ends when that is durable.

        It raises what ``Ledger.begin`` raises, and ``RunsElsewhere``. A plain job does not need the
        ledger: while that is away, it runs all the same.
        """
        entry = active.entry or self._attach(active, JobEntry(draft.key, plain=draft.plain))
        beginning = self._write(entry, lambda: self._begin(active, entry, draft))
        if active.ended:
            self._write(entry, lambda: self._end(active, entry))
        return beginning

    def adopt(self, active: ActiveJob, held: Entry) -> None:
        """A job of the ledger is this server's now: it waits, runs, or has ended."""
        claimed = held.standing is Standing.CLAIMED
        entry = self._attach(active, JobEntry(held.key, held.hold), claimed=claimed)
        entry.calls_at = held.calls_at
        if active.assigned and not claimed:
            self._write(entry, lambda: self._claim(active, entry))

    def run_again(self, active: ActiveJob, key: Key) -> None:
        """Write that a finished job whose images are gone runs again.

        Nobody waits for that: until then the ledger has it as finished.
        """
        entry = self._attach(active, JobEntry(key))
        runtime = active.model.runtime.fingerprint
        self._write(entry, lambda: self._again(entry, runtime))

    def forget(self, active: ActiveJob) -> None:
        """Delete the entry of an ended job whose result is no longer kept."""
        if (entry := active.entry) is not None:
            self._write(entry, lambda: self._forget(entry))

    async def settled(self, active: ActiveJob) -> None:
        """Wait until everything is written that has happened to a job so far.

        Raises ``LedgerUnreachable`` if that takes too long; it is tried until it is written.
        """
        if active.entry is None or active.entry.last is None:
            return
        _, waiting = await asyncio.wait([active.entry.last], timeout=SETTLE_SECONDS)
        if waiting:
            raise LedgerUnreachable(
                "this is done, but the ledger cannot be written: it is undone if the server dies "
                "before that",
                RETRY_SECONDS,
            )

    # The ledger itself.

    async def mine(self) -> list[Entry]:
        """As ``Ledger.mine``."""
        return await self.call("mine", self._ledger.mine())

    async def find(self, key: Key) -> Entry | None:
        """As ``Ledger.find``."""
        return await self.call("find", self._ledger.find(key))

    async def inputs(self, key: Key) -> dict[str, bytes]:
        """As ``Ledger.inputs``."""
        return await self.call("inputs", self._ledger.inputs(key))

    async def fail(self, hold: Hold, error: DarkroomError) -> None:
        """Note that a job failed before it could run here."""
        await self.call("end", self._ledger.end(hold, Standing.FAILED, Failure.of(error)))

    async def queue(self, draft: Draft) -> Begun:
        """Accept a job that whichever server has room first may run, this one too."""
        return await self.call("begin", self._ledger.begin(draft, claimed=False))

    async def call(self, op: str, operation: Awaitable[T]) -> T:
        """The answer of the ledger, counted and timed; raises what ``operation`` raises."""
        began = time.monotonic()
        try:
            answer = await operation
        except LedgerUnreachable as error:
            self.failures += 1
            if not self._away.is_set():
                log.error("ledger unreachable", op=op, why=str(error))
                self._away.set()
                self._observer.set_reachable(False)
                self.on_reachable(False)
            raise
        finally:
            self._observer.ledger_called(op, time.monotonic() - began)
        if self._away.is_set():
            log.info("ledger reachable again")
            self._away.clear()
            self._observer.set_reachable(True)
            self.on_reachable(True)
        return answer

    # What is written.

    def _attach(self, active: ActiveJob, entry: JobEntry, *, claimed: bool = False) -> JobEntry:
        active.entry = entry
        if not active.ended:
            if not (active.assigned or claimed or entry.plain):
                active.on_assigned = lambda: self._write(entry, lambda: self._claim(active, entry))
            active.add_end_callback(lambda: self._write(entry, lambda: self._end(active, entry)))
        return entry

    def _write(
        self, entry: JobEntry, work: Callable[[], Coroutine[Any, Any, None]]
    ) -> "asyncio.Task[None]":
        """Begin ``work`` once the writes before it have ended."""
        task = asyncio.create_task(self._after(entry.last, work))
        entry.last = task
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    async def _after(
        self,
        before: "asyncio.Task[None] | None",
        work: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        if before is not None:
            await asyncio.wait([before])
        await work()

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        # A caller that awaits a beginning gets its error; none does after its call was cancelled.
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, DarkroomError | RunsElsewhere):
            log.error("ledger write failed", exc_info=error)

    async def _begin(self, active: ActiveJob, entry: JobEntry, draft: Draft) -> None:
        try:
            begun = await self.call("begin", self._begun(active, draft))
        except LedgerUnreachable:
            if not draft.plain:
                raise
            self._write(entry, lambda: self._begin_late(active, entry, draft))
            return
        if not begun.new and not self._is_mine(begun.entry):
            raise RunsElsewhere(begun.entry)
        self._note(entry, begun.entry)

    async def _begin_late(self, active: ActiveJob, entry: JobEntry, draft: Draft) -> None:
        """Count a plain job that began while the ledger was away, as long as it runs."""
        while not active.ended:
            with suppress(LedgerUnreachable):
                begun = await self.call("begin", self._begun(active, draft))
                if self._is_mine(begun.entry):
                    self._note(entry, begun.entry)
                return
            await asyncio.sleep(RETRY_SECONDS)

    def _note(self, entry: JobEntry, begun: Entry) -> None:
        entry.hold, entry.calls_at = begun.hold, begun.calls_at
        entry.plain = entry.plain and begun.calls_at is not None

    async def _begun(self, active: ActiveJob, draft: Draft) -> Begun:
        claimed = active.assigned or draft.plain
        begun = await self._ledger.begin(draft, claimed=claimed)
        if not begun.new and begun.entry.standing.ended and self._is_mine(begun.entry):
            # Its result was evicted here, and that is not written yet.
            await self._ledger.forget([begun.entry.hold])
            begun = await self._ledger.begin(draft, claimed=claimed)
        return begun

    def _is_mine(self, entry: Entry) -> bool:
        return self.shared is None or entry.owner == self.shared.id

    async def _again(self, entry: JobEntry, runtime: str) -> None:
        claimed = await self._persist("again", lambda: self._ledger.again(entry.key, runtime))
        if claimed is not None:
            entry.hold = claimed.hold

    async def _claim(self, active: ActiveJob, entry: JobEntry) -> None:
        if entry.hold is not None and not active.ended:
            models = Models(held={active.model.id: active.model.runtime.fingerprint})
            claimed = await self._persist(
                "claim", lambda: self._ledger.claim(1, key=entry.key, models=models)
            )
            if claimed:
                entry.hold = claimed[0].hold

    async def _end(self, active: ActiveJob, entry: JobEntry) -> None:
        hold, shared = entry.hold, self.shared
        if active.outcome is None:
            return
        if hold is None:
            if entry.plain:
                active.entry = None  # It is here only.
            return
        if (
            entry.plain
            and shared is not None
            and await self._persist("drop", lambda: shared.drop(hold))
        ):
            active.entry = None
            return
        if active.released:
            await self._persist("release", lambda: self._ledger.release([hold]))
            return
        standing = STANDINGS[active.outcome]
        failure = None if active.error is None else Failure.of(active.error)
        await self._persist("end", lambda: self._ledger.end(hold, standing, failure))

    async def _forget(self, entry: JobEntry) -> None:
        if (hold := entry.hold) is not None:
            await self._persist("forget", lambda: self._ledger.forget([hold]))

    async def _persist(self, op: str, write: Callable[[], Awaitable[T]]) -> T:
        """Try until it is written."""
        while True:
            with suppress(LedgerUnreachable):
                return await self.call(op, write())
            await asyncio.sleep(RETRY_SECONDS)

    async def _renew(self) -> None:
        """Renew this server's entry; while the ledger is away, find out when it is back."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(RENEW_SECONDS):
                    await self._away.wait()
            if self._away.is_set():
                await asyncio.sleep(RETRY_SECONDS)
            with suppress(LedgerUnreachable):
                await self.call("renew", self._ledger.renew())
