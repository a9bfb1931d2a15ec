"""Quotas of a caller: jobs at once, jobs per minute (a rate limit), and open calls.

And the address that a caller without a token is counted as.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

from darkroom_server.core.caller import Caller
from darkroom_server.core.errors import QuotaExceeded

PER_JOB = 32
"""Callers of one job are processes of one caller; one of them can share what it receives."""

BESIDES_JOBS = 256
"""Calls beyond the number of jobs: those that join one, or read slowly after its end."""

IPV6_PREFIX = 64
"""One subscriber has at least this network, so its addresses count as one."""

Address = IPv4Address | IPv6Address


def counted_as(caller: Caller) -> str:
    """What the limits count ``caller`` as."""
    return caller.address or caller.name


def quota_subject(caller: Caller) -> str:
    """The subject of a quota that ``caller`` exceeds."""
    return f"address:{caller.address}" if caller.address else f"caller:{caller.name}"


class Quotas:
    """Counts jobs by ``counted_as``; times are ``time.monotonic`` seconds.

    A token bucket limits the rate. It holds one minute of jobs, which may begin all at once.
    """

    def __init__(self) -> None:
        self._live: Counter[str] = Counter()
        self._buckets: dict[str, tuple[float, float]] = {}
        """Tokens, and when they were counted, of callers with a rate limit."""

    def check(self, caller: Caller, now: float) -> None:
        """Raise ``QuotaExceeded`` if ``caller`` may not begin another job."""
        key, subject = counted_as(caller), quota_subject(caller)
        live, most, rate = self._live[key], caller.max_jobs, caller.jobs_per_minute
        if most is not None and live >= most:
            raise QuotaExceeded(
                subject,
                f"{live} jobs of {key!r} are here, and {most} may be at once; wait until "
                "one has ended",
            )
        if rate is None:
            self._buckets.pop(key, None)
            return
        full = max(1.0, rate)
        tokens, then = self._buckets.get(key, (full, now))
        tokens = min(full, tokens + (now - then) * rate / 60.0)
        self._buckets[key] = tokens, now
        if tokens < 1.0:
            seconds = (1.0 - tokens) * 60.0 / rate
            raise QuotaExceeded(
                subject,
                f"{key!r} may begin {rate:g} jobs a minute, and has; try again in {seconds:.1f} s",
                seconds,
            )

    def accepted(self, caller: Caller) -> None:
        """Count an accepted job; ``check`` came before."""
        key = counted_as(caller)
        self._live[key] += 1
        if key in self._buckets:
            tokens, then = self._buckets[key]
            self._buckets[key] = tokens - 1.0, then

    def ended(self, caller: Caller) -> None:
        """Uncount a job that ended."""
        key = counted_as(caller)
        self._live[key] -= 1
        if not self._live[key]:
            del self._live[key]


class ConcurrentCallLimiter:
    """Counts calls from before they ask for a job until their answer is read or the call ends.

    A caller that does not read costs memory long after its job has ended: a few megabytes for a
    stream, or a whole reply. ``max_jobs``: jobs that can be here at once.
    """

    def __init__(self, max_jobs: int) -> None:
        self._per_caller = max_jobs + BESIDES_JOBS
        self._open: Counter[tuple[str, ...]] = Counter()

    def acquire(self, caller: Caller, request_id: str) -> Callable[[], None]:
        """Count one call; the function that is returned uncounts it.

        Raises ``QuotaExceeded``.
        """
        key = counted_as(caller)
        of_caller, of_job = (key,), (key, request_id)
        if self._open[of_job] >= PER_JOB:
            raise QuotaExceeded(
                f"request:{request_id}",
                f"{PER_JOB} calls wait for {request_id!r} already, or have not read their answers; "
                "end one of them, or let one pass on what it gets",
            )
        if self._open[of_caller] >= self._per_caller:
            raise QuotaExceeded(
                quota_subject(caller),
                f"{self._per_caller} calls of {key!r} wait already, or have not read "
                "their answers; read them to the end, or cancel them",
            )
        self._open.update((of_caller, of_job))

        def release() -> None:
            for key in (of_caller, of_job):
                self._open[key] -= 1
                if not self._open[key]:
                    del self._open[key]

        return release


class PeerAddresses:
    """Finds callers' addresses; ``trusted``: networks of proxies, separated by commas."""

    def __init__(self, trusted: str | None = None) -> None:
        self._trusted = [ip_network(each.strip()) for each in trusted.split(",")] if trusted else []

    def address_of(self, peer: str, forwarded_for: Sequence[str]) -> str:
        """The caller's address, "" if ``peer``, the other end of the connection, has none.

        Behind a trusted proxy: the last address in ``forwarded_for``, the values of
        ``x-forwarded-for``, that is not one of a trusted proxy, because all entries before it may
        be invented.
        """
        found = _parse(peer)
        if found is None:
            return ""
        if self._is_proxy(found):
            for entry in reversed(",".join(forwarded_for).split(",")):
                address = _parse(entry.strip())
                if address is None:
                    break
                found = address
                if not self._is_proxy(found):
                    break
        return _counted(found)

    def trusts(self, peer: str) -> bool:
        """Whether ``peer`` is a trusted proxy."""
        found = _parse(peer)
        return found is not None and self._is_proxy(found)

    def _is_proxy(self, address: Address) -> bool:
        return any(address in network for network in self._trusted)


def _parse(text: str) -> Address | None:
    """The address in "1.2.3.4", "1.2.3.4:80", "::1" or "[::1]:80"; None if there is none."""
    for host in (text, text.rpartition(":")[0], text.rpartition(":")[0].strip("[]")):
        try:
            address = ip_address(host.strip("[]"))
        except ValueError:
            continue
        mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
        return mapped or address
    return None


def _counted(address: Address) -> str:
    if isinstance(address, IPv6Address) and not address.is_loopback:
        return str(IPv6Network((address, IPV6_PREFIX), strict=False))
    return str(address)
