"""Quotas of a caller: jobs at once, jobs per minute (a rate limit), and open calls."""

from collections import Counter
from collections.abc import Callable

from darkroom_server.core.caller import Caller
from darkroom_server.core.errors import QuotaExceeded

PER_JOB = 32
"""Callers of one job are processes of one caller; one of them can share what it receives."""

BESIDES_JOBS = 256
"""Calls beyond the number of jobs: those that join one, or read slowly after its end."""


class Quotas:
    """Counts jobs by their caller's name; times are ``time.monotonic`` seconds.

    A token bucket limits the rate. It holds one minute of jobs, which may begin all at once.
    """

    def __init__(self) -> None:
        self._live: Counter[str] = Counter()
        self._buckets: dict[str, tuple[float, float]] = {}
        """Tokens, and when they were counted, of callers with a rate limit."""

    def check(self, caller: Caller, now: float) -> None:
        """Raise ``QuotaExceeded`` if ``caller`` may not begin another job."""
        live, most, rate = self._live[caller.name], caller.max_jobs, caller.jobs_per_minute
        subject = f"caller:{caller.name}"
        if most is not None and live >= most:
            raise QuotaExceeded(
                subject,
                f"{live} jobs of {caller.name!r} are here, and {most} may be at once; wait until "
                "one has ended",
            )
        if rate is None:
            self._buckets.pop(caller.name, None)
            return
        full = max(1.0, rate)
        tokens, then = self._buckets.get(caller.name, (full, now))
        tokens = min(full, tokens + (now - then) * rate / 60.0)
        self._buckets[caller.name] = tokens, now
        if tokens < 1.0:
            seconds = (1.0 - tokens) * 60.0 / rate
            raise QuotaExceeded(
                subject,
                f"{caller.name!r} may begin {rate:g} jobs a minute, and has; try again in "
                f"{seconds:.1f} s",
                seconds,
            )

    def accepted(self, name: str) -> None:
        """Count an accepted job; ``check`` came before."""
        self._live[name] += 1
        if name in self._buckets:
            tokens, then = self._buckets[name]
            self._buckets[name] = tokens - 1.0, then

    def ended(self, name: str) -> None:
        """Uncount a job that ended."""
        self._live[name] -= 1
        if not self._live[name]:
            del self._live[name]


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
