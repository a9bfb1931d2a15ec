"""Loads and unloads models for a server that does so only on a caller's order."""

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager


class OnDemand:
    """Loads a model for its requests, one at a time; at most ``most`` are loaded.

    The one that was used longest ago is unloaded: of those without requests, if there are any.
    Otherwise its requests end first, and new ones wait until it is loaded again. ``longest_wait``:
    of a request for its model, in seconds.
    """

    def __init__(
        self,
        most: int,
        load: Callable[[str], Awaitable[None]],
        unload: Callable[[str], Awaitable[None]],
    ) -> None:
        self._most = most
        self._load = load
        self._unload = unload
        self._loaded: OrderedDict[str, None] = OrderedDict()
        self._running: Counter[str] = Counter()
        self._ended = asyncio.Event()
        self._wanted: dict[str, list[asyncio.Future[None]]] = {}
        self._loader: asyncio.Task[None] | None = None
        self.longest_wait = 0.0

    @asynccontextmanager
    async def use(self, model: str) -> AsyncIterator[None]:
        """A request that runs once ``model`` is loaded, and keeps it so until it ends.

        Raises what the load raised.
        """
        began = time.monotonic()
        await self._begin(model)
        self.longest_wait = max(self.longest_wait, time.monotonic() - began)
        try:
            yield
        finally:
            self._end(model)

    async def _begin(self, model: str) -> None:
        if model in self._loaded:
            self._loaded.move_to_end(model)
            self._running[model] += 1
            return
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        self._wanted.setdefault(model, []).append(waiter)
        if self._loader is None:
            self._loader = loop.create_task(self._load_wanted())
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():
                self._end(model)
            raise

    def _end(self, model: str) -> None:
        self._running[model] -= 1
        self._ended.set()

    async def _load_wanted(self) -> None:
        while self._wanted:
            model = next(iter(self._wanted))
            error: Exception | None = None
            try:
                if len(self._loaded) >= self._most:
                    await self._make_room()
                await self._load(model)
            except Exception as found:  # noqa: BLE001 - the requests that wait raise it.
                error = found
            else:
                self._loaded[model] = None
            for waiter in self._wanted.pop(model):
                if waiter.cancelled():
                    continue
                if error is not None:
                    waiter.set_exception(error)
                else:
                    # It runs from now on, so that the next load does not make room here.
                    self._running[model] += 1
                    waiter.set_result(None)
        self._loader = None

    async def _make_room(self) -> None:
        """Unload the first one that is idle, or else the first one when its requests have ended."""
        model = next((each for each in self._loaded if not self._running[each]), None)
        if model is None:
            model = next(iter(self._loaded))
        del self._loaded[model]
        while self._running[model]:
            self._ended.clear()
            await self._ended.wait()
        await self._unload(model)
