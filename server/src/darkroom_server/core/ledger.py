"""The ledger protocol: where accepted jobs stand, whatever happens to the server that has them.

An *entry* is one accepted job of a caller, by the caller's name and its request id. It is queued
(no server has it), claimed (one server, its owner, has it), or ended. Each claim has a new epoch.
``end`` and ``release`` change only an entry whose owner and epoch are still those of the caller of
the method, so a server that was believed dead changes nothing.

The clock is the ledger's. All times that cross this protocol are durations in seconds, relative to
the acceptance of the job or to now, because the clocks of servers differ.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple, Protocol, runtime_checkable

from darkroom_server.core.errors import Failure

LEASE_SECONDS = 5.0
"""A server of a shared ledger that did not renew its lease for this long is dead."""


class Key(NamedTuple):
    """What names an entry: a caller's name, and one of its request ids."""

    caller: str
    request_id: str


class Standing(IntEnum):
    """Where an entry stands. The numbers are stored: never change one."""

    QUEUED = 0
    CLAIMED = 1
    FINISHED = 2
    FAILED = 3
    EXPIRED = 4
    CANCELLED = 5

    @property
    def ended(self) -> bool:
        """The job has its outcome."""
        return self >= Standing.FINISHED


class Hold(NamedTuple):
    """A server's claim to an entry: valid while the entry has this epoch."""

    key: Key
    epoch: int


@dataclass(frozen=True, slots=True)
class Models:
    """The models that a server can run, each with the fingerprint of its runtime.

    ``held``: those in memory. ``loadable``: those that it would load first. ``offers``: what jobs
    may need of them, see ``core.offers``; None: whatever they need.
    """

    held: Mapping[str, str] = field(default_factory=dict)
    loadable: Mapping[str, str] = field(default_factory=dict)
    offers: frozenset[str] | None = None

    @property
    def runtimes(self) -> dict[str, str]:
        """All of them."""
        return {**self.loadable, **self.held}

    def fit(self, needs: frozenset[str]) -> bool:
        """Whether a job that needs that of its model can run here."""
        return self.offers is None or needs <= self.offers


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A job to accept.

    ``record``: the request as sent and its seed, in bytes that only the service layer reads.
    ``inputs``: the files of its pictures by digest. ``counted_as``: what quotas count the caller
    as; with ``max_live``, the caller has at most that many jobs that have not ended. With
    ``max_queued``, a job that is begun as queued has at most that many others before it. ``goal``
    and ``deadline``: seconds after its acceptance, by which it should be done and by which it
    expires, which is never earlier. ``age``: seconds since it was accepted. ``detached``: it runs
    whether or not a call follows it. ``plain``: it ends with the calls of this server that follow
    it, so with this server too; a ledger that is not shared does not note that. ``runtime``: for an
    ``exact`` job, the fingerprint of the one that it would run on here; None for another.
    ``needs``: what its model must offer, see ``core.offers``.
    """

    key: Key
    fingerprint: bytes
    record: bytes
    model: str
    counted_as: str
    goal: float
    runtime: str | None = None
    age: float = 0.0
    deadline: float | None = None
    detached: bool = False
    plain: bool = False
    max_live: int | None = None
    max_queued: int | None = None
    needs: frozenset[str] = frozenset()
    inputs: Mapping[str, bytes] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An entry as the ledger has it.

    ``owner``: the server that has the job, or that ended it; None if it is queued. ``losses``:
    servers that died while they ran it. ``age``: seconds since its acceptance.
    ``goal``: seconds until it should be done, ``remaining``: until its deadline, None without one.
    ``ended_for``: seconds since its end, None before. ``failure``: why it ended without its images,
    None if it did not. ``runtime``: for an ``exact`` job, the fingerprint of the one that it began
    on, which alone may run it again; "" if it did not begin. None for another job. ``needs`` as of
    ``Draft``. ``calls_at``: the server that has all calls that follow a plain job; None for another
    job.
    """

    key: Key
    standing: Standing
    owner: int | None
    epoch: int
    losses: int
    fingerprint: bytes
    record: bytes
    model: str
    counted_as: str
    detached: bool
    age: float
    goal: float
    remaining: float | None
    ended_for: float | None
    failure: Failure | None
    runtime: str | None = None
    needs: frozenset[str] = frozenset()
    calls_at: int | None = None

    @property
    def hold(self) -> Hold:
        """The claim of the owner."""
        return Hold(self.key, self.epoch)


@dataclass(frozen=True, slots=True)
class Begun:
    """The answer to ``begin``: ``new`` is False if the entry was there before."""

    entry: Entry
    new: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerEntry:
    """A server that has the ledger open, ``age`` seconds long.

    ``address``: where the others reach it, "" if they cannot. ``key``: what a call from one of them
    must show. ``certificate``: the PEM of its TLS certificate, empty without TLS.
    """

    id: int
    name: str
    age: float
    address: str = ""
    key: str = field(default="", repr=False)
    certificate: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """What a server of a shared ledger announces to the others; fields as of ``ServerEntry``."""

    address: str
    key: str = field(repr=False)
    certificate: bytes = field(default=b"", repr=False)
    models: Models = Models()


class Pulse(NamedTuple):
    """What ``SharedLedger.beat`` found.

    ``queued``: entries that wait for a server. ``servers``: the ids of those alive. ``reclaimed``:
    entries that servers had that died, and that are queued again. ``returned``: this server was cut
    off since the last beat; what it has may differ from ``mine``. ``extended``: its own entries
    that another server's ``begin`` gave a later deadline, or detached.
    """

    queued: int
    servers: frozenset[int]
    reclaimed: int
    returned: bool
    extended: tuple[Entry, ...]


class Listed(NamedTuple):
    """An entry with its number, which grows with each acceptance."""

    number: int
    entry: Entry


class Ledger(Protocol):
    """Where accepted jobs stand.

    Every method raises ``LedgerUnreachable`` if the ledger cannot be read or written now; then
    nothing has changed, or, if a connection was lost, ``mine`` says what has.
    """

    @property
    def durable(self) -> bool:
        """Whether entries outlive the server."""

    async def open(self) -> int:
        """Begin to use it, and queue again what a server had that died; returns how many entries.

        Raises ``StartupError`` if it cannot be opened.
        """

    async def close(self) -> None:
        """Write what is under way, and leave."""

    async def begin(self, draft: Draft, *, claimed: bool) -> Begun:
        """Accept a job durably, as this server's own if it is ``claimed``, else queued.

        If an entry of that key exists: one that has not ended, or that finished, is returned; of
        one that has not ended, the later deadline holds, it stays detached, and it is no longer
        plain, unless this is a plain job of the same server. One that ended without its images is
        replaced. Raises ``RequestConflict`` if the fingerprints differ, ``QuotaExceeded``, also if
        the inputs of the caller's jobs take as much as they may, and ``QueueFull`` if there is no
        room in the queue or for the inputs.
        """

    async def claim(
        self,
        room: int,
        *,
        models: Models | None = None,
        key: Key | None = None,
        delay: float = 0.0,
    ) -> list[Entry]:
        """Take up to ``room`` queued entries, the nearest goal first.

        ``models``: only of these, only what needs no more than they offer, and of the ``exact``
        jobs that began before only those whose runtime is the same. One of a model that must be
        loaded is taken only after it waited ``delay`` seconds, or if no server that could run it
        has that model in memory.

        Queued entries whose deadline has passed are not taken: they end as expired, whatever they
        need. ``key``: only this entry, late or not, and no other one ends; this server has begun
        it.
        """

    async def end(self, hold: Hold, standing: Standing, failure: Failure | None = None) -> bool:
        """Note how a job ended; False if the entry is not this server's under this epoch.

        The server that accepted a queued job may end it too, as long as no other one claimed it.
        """

    async def release(self, holds: Sequence[Hold]) -> int:
        """Queue jobs of this server again, which costs them no loss; returns how many were."""

    async def find(self, key: Key) -> Entry | None:
        """The entry, None if there is none."""

    async def cancel(self, key: Key) -> Entry | None:
        """Cancel a queued job; returns the entry afterwards, None if there is none.

        A claimed one is its owner's to cancel.
        """

    async def again(self, key: Key, runtime: str | None) -> Entry | None:
        """Claim a finished job whose result is gone, to run it again; None if it is not one.

        ``runtime``: the fingerprint of this server's for its model; None: it cannot run the job.
        Then, and if another runtime generated an ``exact`` one, the job is queued for a server that
        can, if the ledger is shared; else None.
        """

    async def mine(self) -> list[Entry]:
        """Every entry that this server must know, oldest first.

        What it has and what it ended; and, of a ledger that no other server shares, what is queued.
        """

    async def inputs(self, key: Key) -> dict[str, bytes]:
        """The files of a job's pictures by digest."""

    async def forget(self, holds: Sequence[Hold]) -> None:
        """Delete ended entries that still have these epochs; others stay."""

    async def renew(self) -> None:
        """Note that this server lives, and delete entries that ended long ago."""

    async def servers(self) -> list[ServerEntry]:
        """The servers that have the ledger open."""

    def changes(self) -> AsyncIterator[Key]:
        """The keys of entries that were queued, claimed, cancelled or ended, from now on."""


@runtime_checkable
class SharedLedger(Ledger, Protocol):
    """A ledger that several servers have open at once.

    A server lives while its session holds a lock and while it renews its lease with ``beat``. What
    a dead one had is queued again, under a new epoch, so that its late ``end`` changes nothing. The
    plain jobs of its calls are cancelled, unless another server runs them.
    """

    @property
    def id(self) -> int:
        """This server's; another one after it was believed dead."""

    @property
    def news(self) -> asyncio.Event:
        """Set when the queue turned from empty to not empty; the listener clears it."""

    def announce(self, announcement: Announcement) -> None:
        """What the others read of this server, from its next ``beat`` on."""

    async def of_caller(self, caller: str, most: int, before: int | None) -> list[Listed]:
        """At most ``most`` entries of a caller, the last accepted first.

        ``before``: only those with a smaller number.
        """

    async def drop(self, hold: Hold) -> bool:
        """Delete the entry of a plain job that ended here, where its calls are.

        False if it is not one any more, or not this server's under this epoch.
        """

    async def beat(self) -> Pulse:
        """Renew the lease, queue again what dead servers had, and expire what waited too long.

        To be called each second; later calls after ``LEASE_SECONDS`` find that others have reaped
        this server.
        """
