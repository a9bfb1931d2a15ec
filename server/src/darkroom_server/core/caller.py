"""The caller: the identity and the limits that belong to a token."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """One caller; None means no limit.

    ``name`` scopes request ids and results. Limits are counted for the name, or for ``address`` if
    the caller has no token, so that one machine cannot use up the share of others. ``priority`` is
    that of the caller's jobs. ``max_jobs`` limits the jobs that are active at the same time,
    ``jobs_per_minute`` those accepted in a minute. ``admin`` callers may read the server's status,
    use reflection and, see ``security.admin_policy``, change what the server holds.
    """

    name: str
    priority: int = 0
    max_jobs: int | None = None
    jobs_per_minute: float | None = None
    admin: bool = False
    address: str = ""


ANONYMOUS = Caller(name="anybody", admin=True)
"""Every caller, if the server requires no token."""
