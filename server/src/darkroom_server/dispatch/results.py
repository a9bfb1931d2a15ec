"""Which job a caller's request id names, and the results that are kept for a while."""

import asyncio
import itertools
import math
import time
from collections import Counter, defaultdict
from dataclasses import dataclass

from darkroom_server.core.caller import Caller
from darkroom_server.core.errors import RequestConflict, UnknownRequest
from darkroom_server.core.job import PROMPT_FIELDS, Job
from darkroom_server.dispatch.dispatcher import Dispatcher
from darkroom_server.dispatch.jobs.job import ActiveJob

ENTRY_BYTES = 4096
"""Approximate size of an entry besides prompts and images."""

Key = tuple[str, str]
"""A caller's name, and one of its request ids."""


@dataclass(frozen=True, slots=True)
class Page:
    """Some of a caller's jobs with their request ids, the last accepted first.

    ``end``: the end of this page, for the next one; None if this is the last page.
    """

    jobs: tuple[tuple[str, ActiveJob], ...]
    end: int | None


@dataclass(slots=True)
class _Entry:
    """``serial``: counts the accepted jobs of the store."""

    active: ActiveJob
    fingerprint: bytes
    serial: int
    ended_at: float = math.inf
    size: int = 0


class ResultStore:
    """Finds the job that a caller's request id names: a running one, or one that ended recently.

    An ended job is kept for ``result_ttl`` seconds with its images. All of them together take at
    most ``result_bytes``: when full, the oldest result of the caller that uses the most memory is
    evicted. A job that its callers want kept runs for ``reattach_grace`` seconds without any call.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        *,
        result_ttl: float,
        result_bytes: int,
        reattach_grace: float,
    ) -> None:
        self._dispatcher = dispatcher
        self._result_ttl = result_ttl
        self._result_bytes = result_bytes
        self._reattach_grace = reattach_grace
        self._entries: dict[str, dict[str, _Entry]] = {}
        """By caller and request id, in the order of acceptance."""
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
    ) -> ActiveJob:
        """Submit ``job`` under this id; ``keep`` as in ``join``.

        Raises what ``Dispatcher.submit`` raises.
        """
        key = caller.name, request_id
        active = self._dispatcher.submit(job, caller)
        self._remove(key)
        entry = _Entry(active, fingerprint, next(self._serial))
        self._entries.setdefault(caller.name, {})[request_id] = entry
        active.add_end_callback(lambda: self._on_end(key, entry))
        if keep:
            self._keep(active)
        return active

    def find(self, caller: str, request_id: str) -> ActiveJob:
        """The job of this id; raises ``UnknownRequest``."""
        entry = self._entry((caller, request_id))
        if entry is None:
            raise UnknownRequest(request_id)
        return entry.active

    def page(self, caller: str, size: int, after: int | None) -> Page:
        """At most ``size`` jobs of ``caller``; ``after``: the ``end`` of the page before."""
        entries = reversed(self._entries.get(caller, {}).items())
        older = ((id, e) for id, e in entries if after is None or e.serial < after)
        found = list(itertools.islice(older, size + 1))
        shown = found[:size]
        return Page(
            jobs=tuple((request_id, entry.active) for request_id, entry in shown),
            end=shown[-1][1].serial if len(found) > size else None,
        )

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

    def _entry(self, key: Key) -> _Entry | None:
        caller, request_id = key
        return self._entries.get(caller, {}).get(request_id)

    def _on_end(self, key: Key, entry: _Entry) -> None:
        if self._entry(key) is not entry:
            return
        job = entry.active.job
        images = sum(len(image.data) for image in entry.active.images.values())
        prompts = sum(len(getattr(job, name)) for name in PROMPT_FIELDS)
        entry.size = ENTRY_BYTES + 4 * prompts + images
        entry.ended_at = time.monotonic()
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
        caller, request_id = key
        if entries := self._entries.get(caller):
            entries.pop(request_id, None)
            if not entries:
                del self._entries[caller]
        if entry := self._ended.pop(key, None):
            del self._callers[caller][key]
            self._sizes[caller] -= entry.size
            if not self._callers[caller]:
                del self._callers[caller], self._sizes[caller]

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
