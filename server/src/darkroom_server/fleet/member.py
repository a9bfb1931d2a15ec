"""One server of a fleet: alive in the ledger, it takes what it has room for, and finds the rest."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Protocol, TypeVar

import structlog

from darkroom_server.core.errors import (
    DarkroomError,
    LedgerUnreachable,
    NotReady,
    Reason,
    UnknownRequest,
)
from darkroom_server.core.ledger import (
    Announcement,
    Entry,
    Key,
    Models,
    ServerEntry,
    SharedLedger,
    Standing,
)
from darkroom_server.core.offers import offers_of
from darkroom_server.dispatch import ActiveJob, Dispatcher, LedgerEntries, ResultStore, State
from darkroom_server.fleet.mirrors import Mirrors
from darkroom_server.fleet.peers import RETRY_SECONDS, PeerObserver, Peers
from darkroom_server.service.durability import Durability, error_of
from darkroom_server.service.jobs import Generation, GenerationState, generation_of

log = structlog.get_logger(__name__)

BEAT_SECONDS = 0.5
"""Between two renewals of the lease; a dead server is noticed with the next one."""

POLL_SECONDS = 1.0
"""Until the queue is looked at without a notification: those may be lost."""

CLAIM_AT_ONCE = 8
"""Jobs of one claim, so that a server with much room leaves some to the others."""

Answer = TypeVar("Answer")

STATES = {
    Standing.QUEUED: GenerationState.QUEUED,
    Standing.CLAIMED: GenerationState.RUNNING,
    Standing.FINISHED: GenerationState.FINISHED,
    Standing.FAILED: GenerationState.FAILED,
    Standing.EXPIRED: GenerationState.EXPIRED,
    Standing.CANCELLED: GenerationState.CANCELLED,
}


class FleetObserver(PeerObserver, Protocol):
    """Receives what the fleet does, on the event loop; no method blocks or raises."""

    def fleet_seen(self, queued: int, servers: int) -> None:
        """How many jobs wait in the ledger, and how many servers share it."""

    def jobs_reclaimed(self, cause: str, jobs: int) -> None:
        """As ``LedgerObserver.jobs_reclaimed``."""


class FleetMember:
    """The ``Fleet`` of a server: renews its lease, claims jobs, and follows those of others.

    ``reattach_grace`` as of ``Mirrors``, ``claim_delay`` as of ``Ledger.claim``.
    """

    def __init__(
        self,
        ledger: SharedLedger,
        entries: LedgerEntries,
        dispatcher: Dispatcher,
        results: ResultStore,
        durability: Durability,
        peers: Peers,
        observer: FleetObserver,
        *,
        reattach_grace: float,
        claim_delay: float,
    ) -> None:
        self._ledger = ledger
        self._claim_delay = claim_delay
        self._entries = entries
        self._dispatcher = dispatcher
        self._results = results
        self._durability = durability
        self._peers = peers
        self._observer = observer
        self._mirrors = Mirrors(
            ledger,
            entries,
            results,
            durability,
            peers,
            self._again,
            self._cancel_anywhere,
            reattach_grace=reattach_grace,
        )
        self._announcement = Announcement(address="", key="")
        self._tasks: list[asyncio.Task[None]] = []
        self._failures = 0
        self._reconciliations = 0
        self._taking = asyncio.Lock()

    def start(self, announcement: Announcement) -> None:
        """Appear to the others; jobs are claimed once the models are loaded."""
        self._announcement = announcement
        self._announce()
        self._tasks = [
            asyncio.create_task(loop) for loop in (self._beat(), self._claim(), self._listen())
        ]

    async def leave(self) -> None:
        """Claim nothing any more, and end the calls that follow jobs of other servers."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._mirrors.close(
            NotReady(
                "the server is shutting down; another one answers for this job",
                Reason.DRAINING,
                RETRY_SECONDS,
            )
        )
        await self._peers.close()

    # Jobs that are not here.

    async def follow(self, entry: Entry) -> ActiveJob:
        """As ``Fleet.follow``."""
        return await self._mirrors.follow(entry)

    async def find(self, key: Key) -> ActiveJob:
        """As ``Fleet.find``."""
        return await self._mirrors.follow(await self._entry(key))

    async def cancel(self, key: Key) -> bool:
        """As ``Fleet.cancel``."""
        entry = await self._entry(key)
        if entry.standing is Standing.QUEUED:
            cancelled = await self._entries.call("cancel", self._ledger.cancel(key))
            if cancelled is None:
                raise UnknownRequest(key.request_id)
            entry = cancelled
            if entry.standing is Standing.CANCELLED:
                self._mirrors.wake(key)
                return True
        if entry.standing.ended:
            return False
        return await self._at_owner(entry, self._peers.cancel)

    async def _cancel_anywhere(self, key: Key) -> None:
        """Cancel a job that no call here follows, wherever it is; ignored if it has ended."""
        while True:
            try:
                if (local := await self._results.agreed(key)) is None:
                    await self.cancel(key)
                elif not local.subscribers:
                    self._results.cancel(*key)
            except UnknownRequest:
                pass
            except NotReady:
                await asyncio.sleep(RETRY_SECONDS)
                continue
            return

    async def generation(self, key: Key) -> Generation:
        """As ``Fleet.generation``."""
        entry = await self._entry(key)
        if entry.standing is Standing.CLAIMED:
            return await self._at_owner(entry, self._peers.generation)
        return await self._described(entry)

    async def page(
        self, caller: str, most: int, before: int | None
    ) -> list[tuple[int, Generation]]:
        """As ``RecordedJobs.page``; what runs at a server that does not answer has no progress."""
        found = await self._entries.call("list", self._ledger.of_caller(caller, most, before))
        running = {e.owner for _, e in found if e.standing is Standing.CLAIMED}
        servers = await self._entries.call("servers", self._ledger.servers()) if running else []
        asked = [each for each in servers if each.id in running and each.id != self._ledger.id]
        answers = await asyncio.gather(*(self._at(each, caller) for each in asked))
        elsewhere = dict(zip((each.id for each in asked), answers, strict=True))
        return [(number, await self._listed(entry, elsewhere)) for number, entry in found]

    async def _at(self, server: ServerEntry, caller: str) -> dict[str, Generation]:
        """The jobs of a caller at another server; none if it does not answer."""
        try:
            return await self._peers.generations(server, caller)
        except NotReady as error:
            log.info("a server does not list its jobs", server=server.name, why=str(error))
            return {}

    async def _listed(
        self, entry: Entry, elsewhere: Mapping[int, Mapping[str, Generation]]
    ) -> Generation:
        """A job as its server knows it, or else as its entry does."""
        if (local := await self._results.agreed(entry.key)) is not None:
            return generation_of(entry.key.request_id, local)
        if entry.standing is Standing.CLAIMED and entry.owner is not None:
            running = elsewhere.get(entry.owner, {}).get(entry.key.request_id)
            if running is not None:
                return running
        return await self._described(entry)

    async def _described(self, entry: Entry) -> Generation:
        """What the entry says of a job."""
        try:
            job: ActiveJob | None = await self._durability.active_of(entry)
        except (DarkroomError, ValueError):
            job = None  # Its model is not served here, or its record is of a newer version.
        images, steps = (job.job.image_count, job.steps) if job else (0, 0)
        finished = entry.standing is Standing.FINISHED
        failed = entry.standing.ended and not finished
        return Generation(
            request_id=entry.key.request_id,
            state=STATES[entry.standing],
            model=entry.model,
            image_count=images,
            finished_images=images if finished else 0,
            step=steps if finished else 0,
            steps=steps,
            position=0 if entry.standing is Standing.QUEUED else None,
            age=entry.age,
            estimated_finish=None,
            error=error_of(entry) if failed else None,
        )

    async def _entry(self, key: Key) -> Entry:
        entry = await self._entries.find(key)
        if entry is None:
            raise UnknownRequest(key.request_id)
        return entry

    async def _at_owner(
        self, entry: Entry, call: Callable[[ServerEntry, Key], Awaitable[Answer]]
    ) -> Answer:
        """What the server answers that has claimed a job; raises ``NotReady``."""
        servers = await self._entries.call("servers", self._ledger.servers())
        for server in servers:
            if server.id == entry.owner and server.address and server.id != self._ledger.id:
                with suppress(UnknownRequest):  # It has claimed it, and not taken it up yet.
                    return await call(server, entry.key)
        raise NotReady(
            f"generation {entry.key.request_id!r} moves to another server; try again in "
            f"{RETRY_SECONDS:g} s",
            Reason.DRAINING,
            RETRY_SECONDS,
        )

    # Alive.

    async def _beat(self) -> None:
        while True:
            self._announce()
            with suppress(LedgerUnreachable):  # ``call`` logs it.
                await self._beat_once()
            await asyncio.sleep(BEAT_SECONDS * random.uniform(0.8, 1.0))

    async def _beat_once(self) -> None:
        pulse = await self._entries.call("beat", self._ledger.beat())
        self._observer.fleet_seen(pulse.queued, len(pulse.servers))
        self._peers.keep(pulse.servers)
        if pulse.reclaimed:
            log.info("jobs of dead servers wait again", jobs=pulse.reclaimed)
            self._observer.jobs_reclaimed("server_died", pulse.reclaimed)
        if pulse.queued:
            self._ledger.news.set()
        for entry in pulse.extended:
            self._results.extend(entry)
        if pulse.returned or self._entries.failures != self._failures:
            # What was under way may end at the database a little later than here.
            self._failures, self._reconciliations = self._entries.failures, 2
        if self._reconciliations:
            self._ledger.news.set()

    def _announce(self) -> None:
        models = self._models()
        if models != self._announcement.models:
            self._announcement = replace(self._announcement, models=models)
        self._ledger.announce(self._announcement)

    async def _reconcile(self) -> None:
        """After this server was cut off: run what is its own, and hand over what is not.

        The answer to a commit may be lost with its connection.
        """
        known = set(self._results.held())
        mine = {
            entry.hold: entry
            for entry in await self._entries.mine()
            if entry.standing is Standing.CLAIMED
        }
        held = self._results.held()
        for hold, active in held.items():
            if hold in known and hold not in mine and active.assigned:
                log.warning("job is another server's by now", job=hold.key.request_id)
                self._results.hand_over(hold.key, active)
        for hold, entry in mine.items():
            if hold in held or self._results.local(entry.key) is not None:
                continue
            if entry.calls_at == self._ledger.id and not self._mirrors.follows(entry.key):
                await self._entries.call("drop", self._ledger.drop(hold))
            else:
                await self._take_up(entry)

    # Work.

    def _models(self) -> Models:
        availability = self._dispatcher.availability
        if availability.state is not State.READY:
            return Models()
        known = {
            id: model.runtime.fingerprint
            for id, model in availability.models.items()
            if model is not None
        }
        held = {model.id: known.pop(model.id) for model in self._dispatcher.models.in_memory}
        failed = availability.failures
        return Models(
            held,
            {id: each for id, each in known.items() if id not in failed},
            offers_of(filter(None, availability.models.values())),
        )

    async def _claim(self) -> None:
        news = self._ledger.news
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS * random.uniform(0.5, 1.0)):
                    await news.wait()
            news.clear()
            # A job that leaves makes room; that matters only while others wait in the ledger.
            self._dispatcher.on_room(news.set)
            try:
                if self._reconciliations:
                    async with self._taking:
                        await self._reconcile()
                    self._reconciliations -= 1
                if await self._claim_some():
                    self._dispatcher.on_room(None)
            except LedgerUnreachable:
                await asyncio.sleep(POLL_SECONDS)

    async def _claim_some(self) -> bool:
        """Claim while there is room; True if the queue is empty after that."""
        while (room := min(self._dispatcher.places, CLAIM_AT_ONCE)) > 0:
            if not (models := self._models()).runtimes:
                break
            claimed = await self._entries.call(
                "claim", self._ledger.claim(room, models=models, delay=self._claim_delay)
            )
            for entry in claimed:
                await self._take_up(entry)
            if len(claimed) < room:
                return True
        return False

    async def _take_up(self, entry: Entry) -> None:
        """Run a job that was claimed; its inputs may be out of reach for a while."""
        while True:
            try:
                return await self._durability.take_up_one(entry)
            except LedgerUnreachable:
                await asyncio.sleep(POLL_SECONDS)

    async def _again(self, entry: Entry) -> bool:
        """Have the images of a finished job generated again, whose server is gone.

        Here, or, if this server has not what the job needs, or not the runtime that generated the
        images of an ``exact`` one, at a server that has.
        """
        models = self._models()
        runtime = models.runtimes.get(entry.model) if models.fit(entry.needs) else None
        async with self._taking:
            again = await self._entries.call("again", self._ledger.again(entry.key, runtime))
            if again is not None and again.standing is Standing.CLAIMED:
                await self._durability.take_up_one(again)
        return again is not None

    async def _listen(self) -> None:
        """Wake the mirrors of jobs that this server itself changes."""
        async for key in self._ledger.changes():
            self._mirrors.wake(key)
