"""Jobs of the ledger that are not here: those that are still read from it, and unusable ones."""

import asyncio

from darkroom_server.core.errors import (
    Failure,
    GenerationFailed,
    NotReady,
    Reason,
    UnknownRequest,
)
from darkroom_server.core.ledger import Key

RESTORE_RETRY_SECONDS = 2.0
"""As long as the models load, jobs of the ledger are not known."""


class WithheldJobs:
    """Says of a job that is not here why not. What cannot be is known for ``ttl`` seconds.

    ``jobs``: each with the reason, None while it is read.
    """

    def __init__(self, ttl: float) -> None:
        self._ttl = ttl
        self.jobs: dict[Key, Failure | None] = {}

    def add(self, key: Key, failure: Failure | None) -> None:
        """A job is not here; ``failure``: it cannot be, None if it will be soon."""
        self.jobs[key] = failure
        if failure is not None:
            asyncio.get_running_loop().call_later(self._ttl, self.jobs.pop, key, None)

    def is_read(self, key: Key) -> bool:
        """The job is still to be restored."""
        return key in self.jobs and self.jobs[key] is None

    def why(self, key: Key) -> NotReady | GenerationFailed | UnknownRequest:
        """Why the job of ``key`` is not here."""
        if key not in self.jobs:
            return UnknownRequest(key.request_id)
        failure = self.jobs[key]
        return _still_read(key.request_id) if failure is None else GenerationFailed(failure)

    def check_caller(self, caller: str) -> None:
        """Raise ``NotReady`` while jobs of ``caller`` are still read."""
        for key, failure in self.jobs.items():
            if key.caller == caller and failure is None:
                raise _still_read(key.request_id)


def _still_read(request_id: str) -> NotReady:
    return NotReady(
        f"this server has just started, and generation {request_id!r} is not read from the ledger "
        f"yet; try again in {RESTORE_RETRY_SECONDS:.0f} s",
        Reason.MODEL_LOADING,
        RESTORE_RETRY_SECONDS,
    )
