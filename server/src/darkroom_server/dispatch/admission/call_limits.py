"""How many calls may wait at once: for one job, and of one caller."""

from collections import Counter
from collections.abc import Callable

from darkroom_server.core.errors import QuotaExceeded

PER_JOB = 32
"""Callers of one job are one caller's processes, and one of them can pass on what it gets."""

BESIDES_JOBS = 256
"""So many calls more than there may be jobs: those that join one, or read slowly what has ended."""


class ConcurrentCallLimiter:
    """Counts calls from before they ask for a job until all they were sent is read, or given up.

    A caller that does not read costs the server what is on its way to it, a few megabytes a call
    or a whole reply, long after the job has ended. ``max_jobs`` is how many jobs may be here.
    """

    def __init__(self, max_jobs: int) -> None:
        self._per_caller = max_jobs + BESIDES_JOBS
        self._taken: Counter[tuple[str, ...]] = Counter()

    def take(self, caller: str, request_id: str) -> Callable[[], None]:
        """Count one call more; the function that is returned ends it.

        Raises ``QuotaExceeded``.
        """
        of_caller, of_job = (caller,), (caller, request_id)
        if self._taken[of_job] >= PER_JOB:
            raise QuotaExceeded(
                f"request:{request_id}",
                f"{PER_JOB} calls wait for {request_id!r} already, or have not read their answers; "
                "end one of them, or let one pass on what it gets",
            )
        if self._taken[of_caller] >= self._per_caller:
            raise QuotaExceeded(
                f"caller:{caller}",
                f"{self._per_caller} calls of {caller!r} wait already, or have not read their "
                "answers; read them to the end, or cancel them",
            )
        self._taken.update((of_caller, of_job))

        def leave() -> None:
            for key in (of_caller, of_job):
                self._taken[key] -= 1
                if not self._taken[key]:
                    del self._taken[key]

        return leave
