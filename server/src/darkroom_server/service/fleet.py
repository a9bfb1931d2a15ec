"""What a server offers of the jobs that other servers of its ledger have."""

from typing import Protocol

from darkroom_server.core.ledger import Entry, Key
from darkroom_server.dispatch import ActiveJob
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
