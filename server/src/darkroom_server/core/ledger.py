"""The ledger protocol: where accepted jobs stand, whatever happens to the server that has them.

An *entry* is one accepted job of a caller, by the caller's name and its request id. It is queued
(no server has it), claimed (one server, its owner, has it), or ended. Each claim has a new epoch.
``end`` and ``release`` change only an entry whose owner and epoch are still those of the caller of
the method, so a server that was believed dead changes nothing.

The clock is the ledger's. All times that cross this protocol are durations in seconds, relative to
the acceptance of the job or to now, because the clocks of servers differ.
"""

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple, Protocol

from darkroom_server.core.errors import Failure


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A job to accept.

    ``record``: the request as sent and its seed, in bytes that only the service layer reads.
    ``inputs``: the files of its pictures by digest. ``counted_as``: what quotas count the caller
    as; with ``max_live``, the caller has at most that many jobs that have not ended. ``goal`` and
    ``deadline``: seconds after its acceptance, by which it should be done and by which it expires.
    ``age``: seconds since it was accepted. ``detached``: it runs whether or not a call follows it.
    """

    key: Key
    fingerprint: bytes
    record: bytes
    model: str
    counted_as: str
    goal: float
    age: float = 0.0
    deadline: float | None = None
    detached: bool = False
    max_live: int | None = None
    inputs: Mapping[str, bytes] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An entry as the ledger has it.

    ``owner``: the server that has the job, or that ended it; None if it is queued. ``losses``:
    servers that died while they ran it. ``age``: seconds since its acceptance.
    ``goal``: seconds until it should be done, ``remaining``: until its deadline, None without one.
    ``ended_for``: seconds since its end, None before. ``failure``: why it ended without its images,
    None if it did not.
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
    """A server that has the ledger open, ``age`` seconds long."""

    id: int
    name: str
    age: float


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
        one that has not ended, the later deadline holds, and it stays detached. One that ended
        without its images is replaced. Raises ``RequestConflict`` if the fingerprints differ,
        ``QuotaExceeded``, and ``QueueFull`` if there is no room for the inputs.
        """

    async def claim(
        self, room: int, *, models: Collection[str] | None = None, key: Key | None = None
    ) -> list[Entry]:
        """Take up to ``room`` queued entries, the nearest goal first.

        ``models``: only of these models. ``key``: only this entry.
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

    async def again(self, key: Key) -> Entry | None:
        """Claim a finished job whose result is gone, to run it again; None if it is not one."""

    async def mine(self) -> list[Entry]:
        """Every entry that this server must know: queued, its own, and ended; oldest first."""

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
