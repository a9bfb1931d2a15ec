"""Which job a caller's request id names, and the results that are kept for a while."""

import asyncio
import itertools
import math
import time
from collections import Counter, defaultdict
from dataclasses import dataclass

from darkroom_server.core.caller import Caller
from darkroom_server.core.errors import Failure, RequestConflict
from darkroom_server.core.job import PROMPT_FIELDS, Job
from darkroom_server.core.ledger import LEASE_SECONDS, Draft, Entry, Hold, Key
from darkroom_server.dispatch.dispatcher import Dispatcher
from darkroom_server.dispatch.entries import LedgerEntries
from darkroom_server.dispatch.jobs.job import ActiveJob
from darkroom_server.dispatch.withheld import WithheldJobs

ENTRY_BYTES = 4096
"""Approximate size of an entry besides prompts and images."""

DELIVERY_SECONDS = 10.0
"""For the server that has the call of a plain job to fetch the result: it looks each second."""


@dataclass(slots=True)
class _Entry:
    """``serial``: counts the accepted jobs of the store.

    ``named``: its caller knows its id, so its result is kept. ``delivery``: seconds after its end
    in which it is kept in any case, for another server has the call.
    """

    active: ActiveJob
    fingerprint: bytes
    serial: int
    named: bool = True
    delivery: float = 0.0
    ended_at: float = math.inf
    size: int = 0


class ResultStore:
    """Finds the job that a caller's request id names: a running one, or one that ended recently.

    An ended job is kept for ``result_ttl`` seconds with its images. All of them together take at
    most ``result_bytes``: when full, the oldest result of the caller that uses the most memory is
    evicted. A job that its callers want kept runs for ``reattach_grace`` seconds without any call.
    With ``entries``, jobs may have an entry in the ledger; it is deleted with the result.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        *,
        result_ttl: float,
        result_bytes: int,
        reattach_grace: float,
        entries: LedgerEntries | None = None,
    ) -> None:
        self._dispatcher = dispatcher
        self._ledger = entries
        self._result_ttl = result_ttl
        self._result_bytes = result_bytes
        self._reattach_grace = reattach_grace
        self._entries: dict[str, dict[str, _Entry]] = {}
        """By caller and request id, in the order of acceptance."""
        self._withheld = WithheldJobs(result_ttl)
        self._ranks: dict[Key, int] = {}
        """Their serial numbers."""
        self._serial = itertools.count(1)
        self._ended: dict[Key, _Entry] = {}
        """In the order of their ends; ``_callers`` has the same entries by caller."""
        self._callers: defaultdict[str, dict[Key, _Entry]] = defaultdict(dict)
        self._sizes: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def kept_bytes(self) -> int:
        """The size of all ended jobs that are kept."""
        return self._sizes.total()

    def close(self) -> None:
        """Remove everything."""
        if self._timer is not None:
            self._timer.cancel()
        self._entries.clear()
        self._ended.clear()
        self._callers.clear()
        self._sizes.clear()

    def join(
        self,
        caller: Caller,
        request_id: str,
        fingerprint: bytes,
        deadline: float | None,
        *,
        keep: bool = False,
    ) -> ActiveJob | None:
        """The job that an earlier call with this id began; None if it must be submitted.

        ``keep``: the job runs for ``reattach_grace`` seconds after its last call disconnects.
        The job's deadline moves to ``deadline`` if that is later. A job that ended without its
        images is submitted again. Raises ``RequestConflict`` if the earlier call asked for
        something else.
        """
        entry = self._entry((caller.name, request_id))
        if entry is None:
            return None
        if entry.fingerprint != fingerprint:
            raise RequestConflict(request_id)
        if entry.active.ended and not entry.active.finished:
            return None
        self._dispatcher.join(entry.active, deadline)
        if keep:
            self._keep(entry.active)
        return entry.active

    def submit(
        self,
        job: Job,
        caller: Caller,
        request_id: str,
        fingerprint: bytes,
        *,
        keep: bool = False,
        named: bool = True,
    ) -> ActiveJob:
        """Submit ``job`` under this id; ``keep`` as in ``join``.

        ``named``: its caller knows the id, and its result is kept. Raises what
        ``Dispatcher.submit`` raises.
        """
        key = Key(caller.name, request_id)
        active = self._dispatcher.submit(job, caller)
        self._remove(key)
        self._add(key, _Entry(active, fingerprint, next(self._serial), named))
        if keep:
            self._keep(active)
        return active

    def record(self, active: ActiveJob, draft: Draft, *, joined: bool) -> None:
        """Write a job into the ledger; ``active.recording`` ends when it is durable.

        If that fails, a job ends that this call began, and one that it ``joined`` goes on.
        """
        if self._ledger is not None:
            beginning = self._ledger.begin(active, draft)
            active.recording = beginning
            beginning.add_done_callback(
                lambda done: self._on_begun(draft.key, active, done, joined)
            )

    def withhold(self, key: Key, failure: Failure | None = None) -> None:
        """A job of the ledger is not here, and a caller that asks for it gets to know why.

        ``failure``: it cannot be, None if it will soon; those come in the order of acceptance.
        """
        self._withheld.add(key, failure)
        if failure is None:
            self._ranks[key] = next(self._serial)

    def is_withheld(self, key: Key) -> bool:
        """The job is still to be restored."""
        return self._withheld.is_read(key)

    def restore(self, active: ActiveJob, held: Entry) -> None:
        """Add a job that an earlier server accepted; ``held`` is its entry in the ledger.

        It runs, or has ended as the entry says. Those that ended come in the order of their ends.
        """
        serial = self._ranks.pop(held.key, None) or next(self._serial)
        plain = held.calls_at is not None
        named = not plain or bool(held.fingerprint)
        delivery = DELIVERY_SECONDS if plain else 0.0
        entry = _Entry(active, held.fingerprint, serial, named, delivery)
        self._drop(held.key)
        if self._ledger is not None:
            self._ledger.adopt(active, held)
        self._add(held.key, entry)
        if held.ended_for is not None:
            self._keep_result(held.key, entry, time.monotonic() - held.ended_for)
        elif held.detached:
            active.reattach_grace = math.inf
        else:
            if plain:
                active.reattach_grace = LEASE_SECONDS
            else:
                self._keep(active)
            with active.subscribe():
                pass  # Its callers have as long to come back as after a lost connection.

    def sort_restored(self) -> None:
        """Put the restored jobs of each caller into the order of their acceptance."""
        self._ranks.clear()
        for caller, entries in self._entries.items():
            self._entries[caller] = dict(sorted(entries.items(), key=lambda e: e[1].serial))

    def run_again(self, lost: ActiveJob, key: Key, job: Job, caller: Caller) -> ActiveJob:
        """Submit ``job`` in place of the finished ``lost``, whose images are gone.

        Raises what ``Dispatcher.submit`` raises.
        """
        active = self._dispatcher.submit(job, caller)
        old = self._drop(key)
        fingerprint = b"" if old is None else old.fingerprint
        self._add(key, _Entry(active, fingerprint, next(self._serial)))
        if self._ledger is not None:
            self._ledger.run_again(active, key)
        self.detach(active)
        return active

    def find(self, caller: str, request_id: str) -> ActiveJob:
        """The job of this id.

        Raises ``UnknownRequest``; for one that is withheld ``NotReady`` or ``GenerationFailed``.
        """
        key = Key(caller, request_id)
        entry = self._entry(key)
        if entry is None:
            raise self._withheld.why(key)
        return entry.active

    def page(
        self, caller: str, most: int, after: int | None, *, unrecorded: bool = False
    ) -> list[tuple[int, str, ActiveJob]]:
        """At most ``most`` jobs of ``caller`` with their numbers and ids, the last accepted first.

        ``after``: only those with a smaller number. ``unrecorded``: only those without an entry in
        the ledger. Raises ``NotReady`` while jobs of the caller are still read from there.
        """
        self._withheld.check_caller(caller)
        found = (
            (entry.serial, request_id, entry.active)
            for request_id, entry in reversed(self._entries.get(caller, {}).items())
            if (after is None or entry.serial < after)
            and not (unrecorded and entry.active.entry is not None)
        )
        return list(itertools.islice(found, most))

    def local(self, key: Key) -> ActiveJob | None:
        """The job of this id if it is here, whether or not it has ended."""
        entry = self._entry(key)
        return None if entry is None else entry.active

    async def agreed(self, key: Key) -> ActiveJob | None:
        """As ``local``; of a job that begins here, once the ledger has answered.

        Until then another server may have begun one of this id, and that one counts.
        """
        active = self.local(key)
        if active is not None and active.recording is not None:
            await asyncio.wait([active.recording])
            active = self.local(key)
        return active

    def held(self) -> dict[Hold, ActiveJob]:
        """The jobs here that have not ended, by this server's claims to them in the ledger.

        Without those that no other server may run.
        """
        return {
            held.hold: active
            for entries in self._entries.values()
            for active in (entry.active for entry in entries.values())
            if not active.ended and (held := active.entry) is not None
            if held.hold is not None and not held.plain
        }

    def extend(self, held: Entry) -> None:
        """Another server's call wants the job of this entry too, or for longer."""
        active = self.local(held.key)
        if active is None or active.ended:
            return
        if held.calls_at is None:
            self._keep(active)
            if active.entry is not None:
                active.entry.plain = False
        remaining = held.remaining
        self._dispatcher.join(active, None if remaining is None else time.monotonic() + remaining)
        if held.detached:
            self.detach(active)

    def hand_over(self, key: Key, active: ActiveJob) -> None:
        """End a job here that is another server's by now; its callers look there."""
        if self.local(key) is active:
            self._drop(key)
        self._dispatcher.hand_over(active)

    def cancel(self, caller: str, request_id: str) -> bool:
        """Cancel the job of this id; False if it had ended. Raises ``UnknownRequest``."""
        active = self.find(caller, request_id)
        if active.ended:
            return False
        self._dispatcher.cancel(active.job.id)
        return True

    def detach(self, active: ActiveJob) -> None:
        """Let a job run whether or not a call follows it."""
        with active.subscribe():  # Stops its grace timer.
            active.reattach_grace = math.inf

    def _keep(self, active: ActiveJob) -> None:
        active.reattach_grace = max(active.reattach_grace, self._reattach_grace)

    def _entry(self, key: tuple[str, str]) -> _Entry | None:
        caller, request_id = key
        return self._entries.get(caller, {}).get(request_id)

    def _add(self, key: Key, entry: _Entry) -> None:
        self._withheld.jobs.pop(key, None)
        self._entries.setdefault(key.caller, {})[key.request_id] = entry
        entry.active.add_end_callback(lambda: self._on_end(key, entry))

    def _on_begun(
        self, key: Key, active: ActiveJob, begun: "asyncio.Task[None]", joined: bool
    ) -> None:
        """End a new job that could not be written: its caller gets the error, and may try again."""
        if not begun.cancelled() and begun.exception() is None:
            return
        if active.recording is begun:
            active.recording = None
        if not joined:
            if (entry := self._entry(key)) is not None and entry.active is active:
                self._drop(key)
            self._dispatcher.cancel(active.job.id)

    def _on_end(self, key: Key, entry: _Entry) -> None:
        if self._entry(key) is entry and not (entry.named or entry.delivery):
            self._drop(key)
        elif entry.delivery:
            loop = asyncio.get_running_loop()
            loop.call_later(entry.delivery, self._delivered, key, entry)
        else:
            self._delivered(key, entry)

    def _delivered(self, key: Key, entry: _Entry) -> None:
        if self._entry(key) is not entry:
            return
        if entry.named:
            self._keep_result(key, entry, time.monotonic())
        else:
            self._remove(key)

    def _keep_result(self, key: Key, entry: _Entry, ended_at: float) -> None:
        job = entry.active.job
        images = sum(len(image.data) for image in entry.active.images.values())
        prompts = sum(len(getattr(job, name)) for name in PROMPT_FIELDS)
        entry.size = ENTRY_BYTES + 4 * prompts + images
        entry.ended_at = ended_at
        self._ended[key] = self._callers[key[0]][key] = entry
        self._sizes[key[0]] += entry.size
        while self.kept_bytes > self._result_bytes:
            self._remove(self._next_to_evict(key[0]))
        self._evict_expired()

    def _next_to_evict(self, newest: str) -> Key:
        """The oldest of the caller that uses the most memory; of ``newest`` if two use the same."""
        most = max(self._sizes, key=lambda caller: (self._sizes[caller], caller == newest))
        return next(iter(self._callers[most]))

    def _remove(self, key: Key) -> None:
        """Remove a job here and in the ledger."""
        entry = self._drop(key)
        if self._ledger is not None and entry is not None and entry.active.entry is not None:
            self._ledger.forget(entry.active)

    def _drop(self, key: Key) -> _Entry | None:
        caller, request_id = key
        found = None
        if entries := self._entries.get(caller):
            found = entries.pop(request_id, None)
            if not entries:
                del self._entries[caller]
        if entry := self._ended.pop(key, None):
            del self._callers[caller][key]
            self._sizes[caller] -= entry.size
            if not self._callers[caller]:
                del self._callers[caller], self._sizes[caller]
        return found

    def _evict_expired(self) -> None:
        """Remove expired results, and come back when the next one expires."""
        now = time.monotonic()
        while self._ended:
            key, oldest = next(iter(self._ended.items()))
            if oldest.ended_at + self._result_ttl > now:
                break
            self._remove(key)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._ended:
            oldest = next(iter(self._ended.values()))
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(oldest.ended_at + self._result_ttl, self._evict_expired)
