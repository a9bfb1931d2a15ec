"""The events of a job, for the asyncio client."""

import asyncio
from collections import deque
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import grpc

from darkroom_client._protocol.retries import client_closed_error
from darkroom_client._protocol.rpc_errors import was_sent
from darkroom_client._protocol.session import GenerationSession
from darkroom_client._transport.aio import AsyncTransport, being_cancelled
from darkroom_client._transport.sync import STATUS_SECONDS
from darkroom_client._types.events import Event
from darkroom_client._types.result import GenerationResult


class AsyncStream:
    """Like ``Stream``, for ``async with`` and ``async for``."""

    def __init__(self, transport: AsyncTransport, session: GenerationSession) -> None:
        self._transport = transport
        self._session = session
        self._events: deque[Event] = deque()
        self._call: Any = None
        self._entered = False
        self._pause = 0.0
        self._closed = False
        self._wake = asyncio.Event()

    @property
    def request_id(self) -> str:
        """The id of the job, for ``watch`` and ``cancel``."""
        return self._session.request_id

    async def result(self) -> GenerationResult:
        """Like ``Stream.result``."""
        if not self._entered:
            async with self:
                return await self.result()
        async for _ in self:
            pass
        if self._session.result is None:
            raise RuntimeError("this stream has failed: it has no result")
        return self._session.result

    async def close(self) -> None:
        """Close the stream. Idempotent, and safe from a task other than the reader's."""
        if self._closed:
            return
        self._closed = True
        self._wake.set()
        self._transport.finish(self.request_id, needs_cancel=self._session.needs_cancel)
        if self._call is not None:
            self._call.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if not self._entered:
            raise RuntimeError("a stream is a context: async with client.stream(...) as stream:")
        while not self._events:
            if self._session.ended:
                raise StopAsyncIteration
            if self._closed:
                raise RuntimeError("this stream was closed before its end")
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
        """Read one message, after the pause before a call; or handle the end of a call."""
        if self._pause:
            pause, self._pause = self._pause, 0.0
            await self._transport.sleep(pause, self._wake)
            return
        error: grpc.RpcError | None = None
        try:
            if self._call is None:
                call = self._session.next_call()
                if call.uploads:
                    await self._transport.send(call, self._session.metadata)
                self._call = self._transport.open_stream(self._session, call)
            response = await self._call.read()
        except grpc.RpcError as ended:
            error = ended
        except asyncio.CancelledError:
            if being_cancelled():
                raise
            # Nobody cancelled this task: the stream or the client was closed during the read.
            self._session.ended = True
            raise client_closed_error(self.request_id) from None
        else:
            if self._transport.closed:  # A message in transit may still arrive.
                self._session.ended = True
                raise client_closed_error(self.request_id)
            if response is not grpc.aio.EOF:
                self._events.extend(self._session.feed(response.event))
                if self._session.ended:
                    await self._wait_for_status()
                return
        self._call = None
        if not self._session.ended:
            await self._end_call(error)

    async def _end_call(self, error: grpc.RpcError | None) -> None:
        if error is None:
            pause = self._session.on_call_ended(None)
        else:
            if self._transport.closed or self._closed:
                self._session.ended = True
                raise client_closed_error(self.request_id) from error
            problem = await self._transport.find_tls_problem(error, self._session.remaining)
            pause = self._session.on_call_ended(
                self._session.failure(error, problem),
                sent=was_sent(error),
                connected=self._transport.connected,
            )
        self._pause = pause.seconds
        if pause.event is not None:
            self._events.append(pause.event)

    async def _wait_for_status(self) -> None:
        """As in ``Stream``: let the call end by itself."""
        with suppress(TimeoutError):
            async with asyncio.timeout(STATUS_SECONDS):
                await self._call.code()
