"""What a server offers of the jobs that other servers of its ledger have."""

import asyncio
from typing import Protocol

from darkroom_server.core.ledger import Draft, Entry, Key
from darkroom_server.dispatch import ActiveJob, LedgerEntries
from darkroom_server.service.jobs import Generation, RecordedJobs


class Fleet(RecordedJobs, Protocol):
    """The jobs of a shared ledger, wherever they are."""

    async def follow(self, entry: Entry) -> ActiveJob:
        """A job that does here what the one of ``entry`` does elsewhere, wherever it moves.

        Raises what ``Durability.active_of`` raises.
        """

    async def find(self, key: Key) -> ActiveJob:
        """As ``follow``; raises ``UnknownRequest`` and ``LedgerUnreachable`` too."""

    async def cancel(self, key: Key) -> bool:
        """Cancel a job that is not here; False if it had ended.

        Raises ``UnknownRequest``, ``LedgerUnreachable``, and ``NotReady`` if its server does not
        answer.
        """

    async def generation(self, key: Key) -> Generation:
        """Where a job is that is not here; raises as ``cancel``."""


class WaitingJobs:
    """Accepts jobs that no engine here takes at once: they wait in the ledger."""

    def __init__(self, fleet: Fleet, entries: LedgerEntries) -> None:
        self._fleet = fleet
        self._entries = entries
        self._tasks: set[asyncio.Task[tuple[ActiveJob, bool]]] = set()

    async def put(self, checked: ActiveJob, draft: Draft) -> tuple[ActiveJob, bool]:
        """The job of ``draft``, and whether it joined one that an earlier call began.

        ``checked``: the job as this server would run it; it stands for a detached one, which the
        call does not follow. Raises what ``LedgerEntries.queue`` and ``Fleet.follow`` raise.
        """
        # Not cancelled with the call, or nobody would know whether the job waits.
        task = asyncio.create_task(self._put(checked, draft))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_unfollow)
            raise

    async def _put(self, checked: ActiveJob, draft: Draft) -> tuple[ActiveJob, bool]:
        begun = await self._entries.queue(draft)
        if begun.new and draft.detached:
            return checked, False
        return await self._fleet.follow(begun.entry), not begun.new


def _unfollow(done: "asyncio.Task[tuple[ActiveJob, bool]]") -> None:
    """As a call that disconnects later."""
    if not done.cancelled() and done.exception() is None:
        active, _ = done.result()
        with active.subscribe():
            pass
