"""Adds adapters to the offer of a running server, and withdraws them."""

import asyncio
from dataclasses import dataclass, replace

import structlog

from darkroom_server.core.adapter_places import AdapterPlaces
from darkroom_server.core.adapters import AdapterKind
from darkroom_server.core.engine_config import AdapterSource
from darkroom_server.core.errors import AdapterUnusable, NotReady, Reason, UnknownAdapter
from darkroom_server.core.events import AdapterChecked
from darkroom_server.dispatch.adapters import AdapterStatus
from darkroom_server.dispatch.admission.availability import Availability, State, shutting_down
from darkroom_server.dispatch.engines.handle import EngineHandle
from darkroom_server.dispatch.engines.pool import EnginePool
from darkroom_server.dispatch.jobs.registry import JobRegistry

log = structlog.get_logger(__name__)

CHECK_SECONDS = 60.0
"""The most that an engine takes to check an adapter: it ends its batch, and reads headers."""

RETRY_SECONDS = 1.0
"""An engine that died is back, or its models are loaded, in about that time."""


@dataclass(frozen=True, slots=True)
class _Check:
    """An engine looks at an adapter; ``done`` gets what it found."""

    engine: EngineHandle
    adapter: str
    done: asyncio.Future[AdapterChecked]


class AdapterCatalog:
    """Changes which LoRA adapters requests may name; ``places`` are those that they come from.

    What is on offer is part of ``availability``. One engine checks a new adapter; then every engine
    learns of it before the first job that names it, and so does one that starts later.
    """

    def __init__(
        self,
        places: AdapterPlaces,
        availability: Availability,
        pool: EnginePool,
        registry: JobRegistry,
    ) -> None:
        self._places = places
        self._availability = availability
        self._pool = pool
        self._registry = registry
        self._adding = asyncio.Lock()
        self._check: _Check | None = None

    async def add(self, id: str) -> AdapterStatus:
        """Offer the adapter ``id``, and return it; nothing changes if it is on offer.

        Raises ``UnknownAdapter`` if no place has it, ``AdapterUnusable`` if it fits no model or
        jobs use one of that name that was removed, and ``NotReady`` if no engine can check it now.
        """
        async with self._adding:
            if (offered := self._offered(id)) is not None:
                return offered
            source = await self._source(id)
            if jobs := self.jobs_with(id):
                raise AdapterUnusable(
                    f"unfinished jobs still use the adapter {id!r} that was removed ({jobs}); add "
                    "it again when they have ended"
                )
            checked = await self._checked(source)
            if checked.reason:
                raise AdapterUnusable(f"adapter {id!r} fits no model ({checked.reason})")
            rejections = [offer.rejection for offer in checked.offers.values()]
            if all(rejections):
                raise AdapterUnusable(f"adapter {id!r} cannot be offered: {rejections[0]}")
            # The file, whatever its name on a hub was: an engine that starts needs no hub.
            source = replace(source, location=checked.file, revision=None)
            for engine in self._pool.engines:
                engine.engine.offer_adapter(source)
            self._availability.offer_adapter(checked.offers)
            log.info("adapter added", adapter=id, models=list(checked.offers), file=checked.file)
            added = self._offered(id)
            assert added is not None, "it was offered above"
            return added

    def remove(self, id: str) -> int:
        """Withdraw the adapter ``id``; returns the number of unfinished jobs that still use it.

        Raises ``UnknownAdapter`` if it is not on offer, ``AdapterUnusable`` for a ControlNet.
        """
        if self._offered(id) is None:
            loras = [e.id for e in self._availability.adapters if e.kind is AdapterKind.LORA]
            raise UnknownAdapter(id[:256], loras)
        self._availability.withdraw_adapter(id)
        for engine in self._pool.engines:
            engine.engine.withdraw_adapter(id)
        jobs = self.jobs_with(id)
        log.info("adapter removed", adapter=id, jobs=jobs)
        return jobs

    def jobs_with(self, id: str) -> int:
        """The number of jobs that wait or run, and use the adapter ``id``."""
        return sum(
            any(lora.id == id for lora in active.job.loras) for active in self._registry.all()
        )

    def record_check(self, engine: EngineHandle, checked: AdapterChecked) -> None:
        """An engine has looked at an adapter."""
        check = self._check
        if check is None or (check.engine, check.adapter) != (engine, checked.adapter):
            return
        self._check = None
        if not check.done.done():  # The call was cancelled in this moment.
            check.done.set_result(checked)

    def record_death(self, engine: EngineHandle) -> None:
        """An engine died: it checks nothing any more."""
        check = self._check
        if check is None or check.engine is not engine:
            return
        self._check = None
        if not check.done.done():
            check.done.set_exception(_no_engine("the engine died while it checked it"))

    def _offered(self, id: str) -> AdapterStatus | None:
        """The LoRA ``id`` if it is on offer; raises ``AdapterUnusable`` for a ControlNet."""
        found = next((each for each in self._availability.adapters if each.id == id), None)
        if found is not None and found.kind is not AdapterKind.LORA:
            raise AdapterUnusable(
                f"{id!r} is a {found.kind}, which can be neither added nor removed while the "
                "server runs"
            )
        return found

    async def _source(self, id: str) -> AdapterSource:
        """Where ``id`` comes from; raises ``UnknownAdapter`` or, without any place, its reason."""
        if not self._places.configured:
            raise AdapterUnusable(
                "this server was started without --lora-dir and --lora, so no adapter can be added"
            )
        # The folder may be on a slow disk.
        sources = await asyncio.to_thread(self._places.sources)
        offered = {each.id for each in self._availability.adapters}
        others = [each.id for each in sources if each.id not in offered]
        for source in sources:
            if source.id == id:
                return source
        raise UnknownAdapter(id[:256], others, "besides what it offers, the server")

    async def _checked(self, source: AdapterSource) -> AdapterChecked:
        """What a ready engine finds out about an adapter; raises ``NotReady``."""
        if self._availability.state is State.DRAINING:
            raise shutting_down()
        engine = next((engine for engine in self._pool.engines if engine.ready), None)
        if engine is None:
            raise _no_engine("no engine is ready to check it")
        done: asyncio.Future[AdapterChecked] = asyncio.get_running_loop().create_future()
        self._check = check = _Check(engine, source.id, done)
        engine.engine.check_adapter(source)
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                return await done
        except TimeoutError:
            raise _no_engine(f"the engine did not check it within {CHECK_SECONDS:g} s") from None
        finally:
            if self._check is check:
                self._check = None


def _no_engine(why: str) -> NotReady:
    return NotReady(
        f"the adapter cannot be added now: {why}; try again",
        Reason.ENGINE_FAILED,
        RETRY_SECONDS,
    )
