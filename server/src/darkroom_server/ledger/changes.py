"""What changes in a ledger, for callers that wait for it."""

import asyncio
from collections.abc import AsyncIterator

from darkroom_server.core.ledger import Key


class Changes:
    """Sends the key of each entry that changed to every listener, on the event loop."""

    def __init__(self) -> None:
        self._listeners: set[asyncio.Queue[Key]] = set()

    def publish(self, *keys: Key) -> None:
        """These entries changed."""
        for listener in self._listeners:
            for key in keys:
                listener.put_nowait(key)

    def listen(self) -> AsyncIterator[Key]:
        """The keys that change from now on."""
        # Added here and not in the generator, which begins only when it is first asked.
        listener: asyncio.Queue[Key] = asyncio.Queue()
        self._listeners.add(listener)
        return self._keys(listener)

    async def _keys(self, listener: asyncio.Queue[Key]) -> AsyncIterator[Key]:
        try:
            while True:
                yield await listener.get()
        finally:
            self._listeners.discard(listener)
