"""Calls in flight: gRPC's own ``stop`` does not wait for all handlers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from darkroom_server.rpc.context import Context
from darkroom_server.rpc.interceptors.base import ContextInterceptor, Method


class InFlightCalls(ContextInterceptor):
    """Counts the running handlers of our own services; a health watch would never end."""

    def __init__(self) -> None:
        self._count = 0
        self._none = asyncio.Event()
        self._none.set()

    async def wait_for_none(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds; True if no handler of ours runs any more."""
        try:
            async with asyncio.timeout(timeout):
                await self._none.wait()
        except TimeoutError:
            return False
        return True

    def around(
        self, method: Method, context: Context, request: Any
    ) -> AbstractAsyncContextManager[None]:
        """Count the call."""
        return self._around(method)

    @asynccontextmanager
    async def _around(self, method: Method) -> AsyncIterator[None]:
        if not method.service.startswith("darkroom."):
            yield
            return
        self._count += 1
        self._none.clear()
        try:
            yield
        finally:
            self._count -= 1
            if self._count == 0:
                self._none.set()
