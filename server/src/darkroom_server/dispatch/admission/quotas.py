"""Quotas of a caller: jobs at once, and a rate limit in jobs per minute (token bucket)."""

from collections import Counter

from darkroom_server.core.caller import Caller
from darkroom_server.core.errors import QuotaExceeded


class Quotas:
    """Counts jobs by their caller's name; times are ``time.monotonic`` seconds.

    The bucket holds one minute of jobs: a caller may begin them all at once.
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
