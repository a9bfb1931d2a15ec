"""A generation that is followed, for the asyncio client."""

import asyncio
from collections import deque
from types import TracebackType
from typing import Any, Self

import grpc

from darkroom_client._async_link import AsyncLink, being_cancelled
from darkroom_client._call import closed_under
from darkroom_client._errors import DarkroomError
from darkroom_client._events import Event
from darkroom_client._following import Following
from darkroom_client._result import GenerationResult
from darkroom_client._rpc_errors import from_rpc_error, was_sent


class AsyncStream:
    """As ``Stream``, for ``async with`` and ``async for``."""

    def __init__(self, link: AsyncLink, following: Following) -> None:
        self._link = link
        self._following = following
        self._events: deque[Event] = deque()
        self._call: Any = None
        self._entered = False
        self._left = asyncio.Event()

    @property
    def request_id(self) -> str:
        """Names the generation, also for ``watch`` and ``cancel``."""
        return self._following.request_id

    async def result(self) -> GenerationResult:
        """As ``Stream.result``."""
        async for _ in self:
            pass
        if self._following.result is None:
            raise RuntimeError("this stream has failed before: it has no result")
        return self._following.result

    async def close(self) -> None:
        """Leave; may be called again, and from another task than the reader's."""
        if self._left.is_set():
            return
        self._left.set()
        self._link.settle(self.request_id, leaves_work=self._following.leaves_work)
        if self._call is not None:
            self._call.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if not self._entered:
            raise RuntimeError("a stream is a context: async with client.stream(...) as stream:")
        while not self._events:
            if self._following.ended:
                raise StopAsyncIteration
            if self._left.is_set():
                raise RuntimeError("this stream was left before its end")
            await self._read()
        return self._events.popleft()

    async def __aenter__(self) -> Self:
        self._entered = True
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _read(self) -> None:
        """One message, or one end of a call and the wait after it."""
        failure: DarkroomError | None = None
        sent = True
        try:
            if self._call is None:
                attempt = self._following.next_call()
                self._call = self._link.follow(self._following, attempt)
            response = await self._call.read()
        except grpc.RpcError as error:
            failure, sent = self._failure(error), was_sent(error)
        except asyncio.CancelledError:
            if being_cancelled():
                raise
            # Nobody cancelled this task: the stream or the client was closed under it.
            self._following.ended = True
            raise closed_under(self.request_id) from None
        else:
            if self._link.closed:  # What was on its way may still arrive.
                self._following.ended = True
                raise closed_under(self.request_id)
            if response is not grpc.aio.EOF:
                self._events.extend(self._following.feed(response.event))
                return
        self._call = None
        if not self._following.ended:
            await self._pause(self._following.hung_up(failure, sent=sent))

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._left.wait()
        except TimeoutError:
            pass

    def _failure(self, error: grpc.RpcError) -> DarkroomError:
        if self._link.closed or self._left.is_set():
            self._following.ended = True
            raise closed_under(self.request_id) from error
        return from_rpc_error(
            error,
            address=self._following.address,
            timeout=self._following.timeout,
            request_id=self.request_id,
        )
