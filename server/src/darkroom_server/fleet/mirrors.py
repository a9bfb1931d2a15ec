"""Jobs that other servers have, as callers of this one see them, wherever the jobs move."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import replace

import structlog

from darkroom_server.core.errors import DarkroomError, LedgerUnreachable, UnknownRequest
from darkroom_server.core.events import PreviewReady, SampleProgress, StageSeconds
from darkroom_server.core.finished_image import FinishedImage
from darkroom_server.core.ledger import Entry, Key, ServerEntry, SharedLedger, Standing
from darkroom_server.dispatch import (
    ActiveJob,
    Finished,
    ImageDone,
    JobEntry,
    JobEvent,
    LedgerEntries,
    Queued,
    Restarted,
    ResultStore,
    Started,
)
from darkroom_server.fleet.peers import Ended, Peers, RemoteImage
from darkroom_server.service.durability import Durability, error_of

log = structlog.get_logger(__name__)

FIRST_LOOK_SECONDS = 0.05
"""Until a job is looked for again: claimed jobs are taken up within milliseconds."""

LONGEST_LOOK_SECONDS = 1.0

RETRY_SECONDS = 1.0


class Mirrors:
    """Follows jobs of a shared ledger, each once for all calls of this server that want it.

    A *mirror* is a job that no engine here has: it repeats what happens to the real one. It ends
    with that one, or when no call follows it for ``reattach_grace`` seconds; a job that still waits
    then is cancelled, as it would be here, unless it is detached. A plain job is cancelled at once,
    by ``cancel``, wherever it is. ``again`` runs a finished job here whose images are gone with its
    server; False if another server does.
    """

    def __init__(
        self,
        ledger: SharedLedger,
        entries: LedgerEntries,
        results: ResultStore,
        durability: Durability,
        peers: Peers,
        again: Callable[[Entry], Awaitable[bool]],
        cancel: Callable[[Key], Awaitable[None]],
        *,
        reattach_grace: float,
    ) -> None:
        self._ledger = ledger
        self._entries = entries
        self._results = results
        self._durability = durability
        self._peers = peers
        self._again = again
        self._cancel = cancel
        self._reattach_grace = reattach_grace
        self._mirrors: dict[Key, ActiveJob] = {}
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._woken: dict[Key, asyncio.Event] = {}
        self._endings: set[asyncio.Task[None]] = set()

    async def follow(self, entry: Entry) -> ActiveJob:
        """The mirror of an entry's job."""
        key = entry.key
        mirror = await self._durability.active_of(entry)
        plain = entry.calls_at == self._ledger.id
        grace = 0.0 if entry.detached or plain else self._reattach_grace
        if (known := self._mirrors.get(key)) is not None and not known.ended:
            known.reattach_grace = max(known.reattach_grace, grace)
            return known
        mirror.entry = JobEntry(key)
        mirror.reattach_grace = grace
        mirror.on_unsubscribed = lambda _: self._forget(entry, mirror)
        self._mirrors[key] = mirror
        self._woken[key] = asyncio.Event()
        task = self._tasks[key] = asyncio.create_task(self._repeat(key, mirror))
        task.add_done_callback(lambda done: self._on_done(key, done))
        return mirror

    def follows(self, key: Key) -> bool:
        """Whether a call of this server follows the job."""
        return key in self._mirrors

    def wake(self, key: Key) -> None:
        """Something happened to this job: look now."""
        if (woken := self._woken.get(key)) is not None:
            woken.set()

    async def close(self, error: DarkroomError) -> None:
        """End all mirrors with ``error``: their callers are to ask another server."""
        tasks = [*self._tasks.values(), *self._endings]
        for mirror in self._mirrors.values():
            mirror.end(error)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _on_done(self, key: Key, task: "asyncio.Task[None]") -> None:
        if self._tasks.get(key) is task:
            self._remove(key)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("following a job failed", job=key.request_id, exc_info=error)

    def _forget(self, entry: Entry, mirror: ActiveJob) -> None:
        """No call of this server follows the job any more."""
        if self._mirrors.get(entry.key) is mirror:
            self._remove(entry.key).cancel()
            if not entry.detached:
                ending = asyncio.create_task(self._leave(entry))
                self._endings.add(ending)
                ending.add_done_callback(self._endings.discard)

    def _remove(self, key: Key) -> "asyncio.Task[None]":
        del self._mirrors[key], self._woken[key]
        return self._tasks.pop(key)

    async def _leave(self, then: Entry) -> None:
        """Cancel a job that still waits, or a plain one of a call of this server.

        ``then``: its entry when calls here began to follow it. Calls of another server may have
        joined them.
        """
        key = then.key
        try:
            now = await self._entries.find(key)
            if now is None or now.detached or self.follows(key) or now.calls_at != then.calls_at:
                return
            if now.calls_at is None:
                await self._entries.call("cancel", self._ledger.cancel(key))
            elif now.calls_at == self._ledger.id:
                await self._cancel(key)
        except LedgerUnreachable:
            log.warning("a job that nobody waits for stays queued", job=key.request_id)

    # Until the job has ended.

    async def _repeat(self, key: Key, mirror: ActiveJob) -> None:
        seen, seconds, woken = -1, FIRST_LOOK_SECONDS, self._woken[key]
        while True:
            woken.clear()
            try:
                entry = await self._entries.find(key)
                if entry is None:
                    mirror.end(UnknownRequest(key.request_id))
                    break
                if entry.epoch != seen and mirror.started:
                    mirror.reset()
                    mirror.publish(Restarted(max(1, entry.losses)))
                seen = entry.epoch
                followed = await self._repeat_entry(entry, mirror)
            except LedgerUnreachable:
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if mirror.ended:
                break
            seconds = FIRST_LOOK_SECONDS if followed else min(seconds * 2, LONGEST_LOOK_SECONDS)
            await _wait(woken, seconds * random.uniform(0.5, 1.0))

    async def _repeat_entry(self, entry: Entry, mirror: ActiveJob) -> bool:
        """Follow the job where its entry says that it is; False if it is nowhere yet."""
        if entry.standing.ended and entry.standing is not Standing.FINISHED:
            mirror.end(error_of(entry))
            return True
        if entry.standing is Standing.QUEUED:
            return False
        if (local := await self._results.agreed(entry.key)) is not None:
            return await self._repeat_local(local, mirror)
        servers = await self._entries.call("servers", self._ledger.servers())
        owner = next((each for each in servers if each.id == entry.owner), None)
        if owner is not None and owner.address and owner.id != self._ledger.id:
            return await self._repeat_remote(owner, entry.key, mirror)
        if entry.standing is Standing.FINISHED:
            # Its images are gone with its server: they are generated again.
            return await self._again(entry)
        return False

    async def _repeat_local(self, local: ActiveJob, mirror: ActiveJob) -> bool:
        """The job runs here by now."""
        with local.subscribe() as subscription:
            async for event in subscription:
                if isinstance(event, ImageDone):
                    _add_image(mirror, event.image_index, subscription.image(event.image_index))
                else:
                    _apply(mirror, event)
        if local.released:
            return True  # It moves on.
        try:
            mirror.end(await local.result())
        except DarkroomError as error:
            mirror.end(error)
        return True

    async def _repeat_remote(self, owner: ServerEntry, key: Key, mirror: ActiveJob) -> bool:
        received = False
        async with aclosing(self._peers.watch(owner, key)) as events:
            async for event in events:
                received = True
                match event:
                    case Ended(error=None, stages=stages):
                        _finish(mirror, stages)
                    case Ended(error=DarkroomError() as error):
                        mirror.end(error)
                    case RemoteImage():
                        mirror.model = replace(
                            mirror.model, runtime=replace(mirror.model.runtime, **event.runtime)
                        )
                        _add_image(mirror, event.index, event.image)
                    case Queued() | Started() | Restarted() | SampleProgress() | PreviewReady():
                        _apply(mirror, event)
        return received


async def _wait(woken: asyncio.Event, seconds: float) -> None:
    """Wait until ``woken`` is set, at most ``seconds``."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await woken.wait()


def _apply(mirror: ActiveJob, event: JobEvent) -> None:
    match event:
        case Queued(position):
            mirror.set_position(position)
        case Started():
            mirror.position = None
            mirror.start()
        case SampleProgress():
            mirror.advance(event)
        case PreviewReady():
            mirror.add_preview(event)
        case Restarted():
            mirror.reset()
            mirror.publish(event)


def _add_image(mirror: ActiveJob, index: int, image: FinishedImage) -> None:
    if index not in mirror.images:  # A rerun makes the same image again.
        mirror.add_image(index, image)


def _finish(mirror: ActiveJob, stages: StageSeconds) -> None:
    if mirror.complete:
        mirror.end(Finished(tuple(mirror.images[i] for i in range(mirror.job.image_count)), stages))
