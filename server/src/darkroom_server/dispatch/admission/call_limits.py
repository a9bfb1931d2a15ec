"""How many calls may be open at once: for one job, and of one caller."""

from collections import Counter
from collections.abc import Callable

from darkroom_server.core.errors import QuotaExceeded

PER_JOB = 32
"""Callers of one job are processes of one caller, and one of them can share what it receives."""

BESIDES_JOBS = 256
"""Calls beyond the number of jobs: those that join a job, or read slowly after its end."""


class ConcurrentCallLimiter:
    """Counts calls from before they ask for a job until their answer is read or the call ends.

    A caller that does not read costs memory long after its job has ended: a few megabytes for a
    stream, or a whole reply. ``max_jobs``: jobs that can be here at once.
    """

    def __init__(self, max_jobs: int) -> None:
        self._per_caller = max_jobs + BESIDES_JOBS
        self._open: Counter[tuple[str, ...]] = Counter()

    def acquire(self, caller: str, request_id: str) -> Callable[[], None]:
        """Count one call; the function that is returned uncounts it.

        Raises ``QuotaExceeded``.
        """
        of_caller, of_job = (caller,), (caller, request_id)
        if self._open[of_job] >= PER_JOB:
            raise QuotaExceeded(
                f"request:{request_id}",
                f"{PER_JOB} calls wait for {request_id!r} already, or have not read their answers; "
                "end one of them, or let one pass on what it gets",
            )
        if self._open[of_caller] >= self._per_caller:
            raise QuotaExceeded(
                f"caller:{caller}",
                f"{self._per_caller} calls of {caller!r} wait already, or have not read their "
                "answers; read them to the end, or cancel them",
            )
        self._open.update((of_caller, of_job))

        def release() -> None:
            for key in (of_caller, of_job):
                self._open[key] -= 1
                if not self._open[key]:
                    del self._open[key]

        return release
