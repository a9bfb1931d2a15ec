"""Who asks: what a token says of its bearer."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """One caller; None is no limit.

    ``name`` scopes request ids and results. Limits are counted for the name, or for ``address`` if
    the caller has no token: nobody can use up the share of other machines. ``priority`` goes into
    the order. ``max_jobs`` may be
    accepted and not ended at once, ``jobs_per_minute`` accepted in a minute. ``admin`` callers may
    ask for the server's status and use reflection.
    """

    name: str
    priority: int = 0
    max_jobs: int | None = None
    jobs_per_minute: float | None = None
    admin: bool = False
    address: str = ""


ANONYMOUS = Caller(name="anybody", admin=True)
"""Everybody is this one where the server asks for no token."""
