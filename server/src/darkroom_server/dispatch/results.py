"""Request ids: which job each names, and what became of it."""

import asyncio
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from darkroom_server.core.caller import Caller
from darkroom_server.core.errors import RequestConflict, UnknownRequest
from darkroom_server.core.job import Job
from darkroom_server.dispatch.dispatcher import Dispatcher
from darkroom_server.dispatch.jobs.job import ActiveJob

ENTRY_BYTES = 4096
"""What an entry takes besides prompts and images, about."""

Key = tuple[str, str]
"""A caller's name, and one of its request ids."""


@dataclass(slots=True)
class _Entry:
    accepted: ActiveJob
    body: bytes
    ended_at: float = math.inf
    size: int = 0


class ResultStore:
    """Finds the job that a caller's request id names: a running one, or one that ended of late.

    An ended job is remembered for ``result_ttl`` seconds, with its images; all of them together
    take ``result_bytes`` at most, and the oldest of the caller that has most go first. A job that
    its callers want kept lives for ``reattach_grace`` seconds without a waiter.
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
        self._entries: dict[Key, _Entry] = {}
        self._ended: dict[Key, _Entry] = {}
        """In the order of their ends; ``_callers`` has them too, by caller."""
        self._callers: defaultdict[str, dict[Key, _Entry]] = defaultdict(dict)
        self._sizes: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def kept_bytes(self) -> int:
        """What the jobs take that have ended and are remembered."""
        return self._sizes.total()

    def close(self) -> None:
        """Forget everything."""
        if self._timer is not None:
            self._timer.cancel()
        self._entries.clear()
        self._ended.clear()
        self._callers.clear()
        self._sizes.clear()

    def begin(
        self,
        caller: Caller,
        request_id: str,
        body: bytes,
        deadline: float | None,
        make_job: Callable[[], Job],
    ) -> tuple[ActiveJob, bool]:
        """The job of this id, and whether it was there before; if not, ``make_job``'s is submitted.

        ``body`` stands for all that was asked for. A job that was there lives until ``deadline``
        too. One that ended unfinished is run anew. Raises ``RequestConflict`` where the id names
        another body, and what ``make_job`` and ``Dispatcher.submit`` raise.
        """
        key = caller.name, request_id
        entry = self._entries.get(key)
        if entry is not None:
            if entry.body != body:
                raise RequestConflict(request_id)
            if entry.accepted.finished or not entry.accepted.ended:
                self._dispatcher.join(entry.accepted, deadline)
                return entry.accepted, True
        accepted = self._dispatcher.submit(make_job(), caller)
        if entry is not None:
            self._forget(key)
        self._entries[key] = entry = _Entry(accepted, body)
        accepted.when_ended(lambda: self._on_end(key, entry))
        return accepted, False

    def find(self, caller: str, request_id: str) -> ActiveJob:
        """The job of this id; raises ``UnknownRequest``."""
        entry = self._entries.get((caller, request_id))
        if entry is None:
            raise UnknownRequest(request_id)
        return entry.accepted

    def cancel(self, caller: str, request_id: str) -> bool:
        """Cancel the job of this id; False where it had ended. Raises ``UnknownRequest``."""
        accepted = self.find(caller, request_id)
        if accepted.ended:
            return False
        self._dispatcher.cancel(accepted.job.id)
        return True

    def keep(self, accepted: ActiveJob) -> None:
        """Let a job live for a while when its last waiter has left."""
        accepted.linger = max(accepted.linger, self._reattach_grace)

    def detach(self, accepted: ActiveJob) -> None:
        """Let a job run whether or not somebody waits."""
        with accepted.waiter():  # Nobody may have waited for a while, and its time be running out.
            accepted.linger = math.inf

    def _on_end(self, key: Key, entry: _Entry) -> None:
        if self._entries.get(key) is not entry:
            return
        job = entry.accepted.job
        images = sum(len(image.data) for image in entry.accepted.images.values())
        prompts = len(job.prompt) + len(job.negative_prompt)
        entry.size = ENTRY_BYTES + 4 * prompts + images
        entry.ended_at = time.monotonic()
        self._ended[key] = self._callers[key[0]][key] = entry
        self._sizes[key[0]] += entry.size
        while self.kept_bytes > self._result_bytes:
            self._forget(self._one_too_many(key[0]))
        self._evict()

    def _one_too_many(self, newest: str) -> Key:
        """The oldest of the caller that has most; where two have the same, of ``newest``."""
        most = max(self._sizes, key=lambda caller: (self._sizes[caller], caller == newest))
        return next(iter(self._callers[most]))

    def _forget(self, key: Key) -> None:
        self._entries.pop(key, None)
        if entry := self._ended.pop(key, None):
            caller = key[0]
            del self._callers[caller][key]
            self._sizes[caller] -= entry.size
            if not self._callers[caller]:
                del self._callers[caller], self._sizes[caller]

    def _evict(self) -> None:
        """Forget what is too old; come back when the next is too old."""
        now = time.monotonic()
        while self._ended:
            key, oldest = next(iter(self._ended.items()))
            if oldest.ended_at + self._result_ttl > now:
                break
            self._forget(key)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._ended:
            oldest = next(iter(self._ended.values()))
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(oldest.ended_at + self._result_ttl, self._evict)
