"""The asyncio client's I/O: its channels, its calls and their cancellation."""

import asyncio
import time
from typing import Any, TypeVar

import grpc

from darkroom.v1 import generation_pb2, generation_pb2_grpc
from darkroom_client._protocol.call import Call, client_closed_error
from darkroom_client._protocol.session import GenerationSession, NextCall
from darkroom_client._protocol.stubs import Stubs
from darkroom_client._settings import Settings
from darkroom_client._transport.channels import (
    check_files,
    open_async_channels,
    open_direct_async_channel,
)
from darkroom_client._transport.server_address import server_address
from darkroom_client._transport.sync import CANCEL_ON_EXIT_SECONDS

A = TypeVar("A")


class AsyncTransport:
    """Like ``SyncTransport``, for the event loop of its first call, which gRPC ties it to.

    ``_in_flight`` and ``_cancels`` are as there; only the event loop touches them.
    """

    def __init__(self, settings: Settings) -> None:
        check_files(settings.tls)
        self.closed = False
        self._settings = settings
        self._loop: asyncio.AbstractEventLoop | None = None
        self._channels: tuple[grpc.aio.Channel, ...] = ()
        self._stubs: Stubs | None = None
        self._in_flight: dict[str, Call[Any] | GenerationSession] = {}
        self._cancels: set[asyncio.Task[None]] = set()

    @property
    def stubs(self) -> Stubs:
        """The services; the channels open at the first use."""
        self.check_open()
        if self._stubs is None:
            self._loop = asyncio.get_running_loop()
            self._channels = open_async_channels(self._settings)
            self._stubs = Stubs(*self._channels)
        if self._loop is not asyncio.get_running_loop():
            raise RuntimeError("this client belongs to another event loop: make one in each")
        return self._stubs

    async def run(self, call: Call[A]) -> A:
        """Make ``call`` and wait for its answer."""
        stubs = self.stubs
        self._register(call)
        needs_cancel = True
        try:
            response = await self._answer(call, stubs)
            needs_cancel = False
        except grpc.RpcError as error:
            failure = call.failure(error)
            needs_cancel = call.needs_cancel(failure)
            raise failure from error
        except asyncio.CancelledError:
            if being_cancelled():
                raise
            # Nobody cancelled this task: the channel was closed during the call.
            raise client_closed_error(call.request_id) from None
        finally:
            self.finish(call.request_id, needs_cancel=needs_cancel)
        return call.decode(response)

    async def _answer(self, call: Call[Any], stubs: Stubs) -> Any:
        """The answer of the first try of ``call``, or of the second."""
        ends_at = call.ends_at()
        try:
            return await _try(call, stubs)
        except grpc.RpcError as error:
            retry_call = call.retry_call(error, ends_at)
            if retry_call is None or self.closed:
                raise
        return await _try(retry_call, stubs)

    def open_stream(self, session: GenerationSession, call: NextCall) -> Any:
        """Open the stream of ``call``; returns gRPC's call."""
        if self.closed:
            raise client_closed_error(session.request_id)
        self._register(session)
        return call.method(self.stubs)(
            call.message, timeout=call.timeout, metadata=session.metadata
        )

    def finish(self, request_id: str | None, *, needs_cancel: bool) -> None:
        """Note that no caller waits for this job any more; cancel it if it needs that."""
        job = self._in_flight.pop(request_id, None) if request_id is not None else None
        if job is not None and needs_cancel and self._stubs is not None:
            cancel = asyncio.ensure_future(self._cancel(job, self._stubs))
            self._cancels.add(cancel)
            cancel.add_done_callback(self._cancels.discard)

    def check_open(self) -> None:
        """Raise ``RuntimeError`` for a client that is closed."""
        if self.closed:
            raise RuntimeError("this client is closed")

    async def close(self) -> None:
        """Cancel every job in flight, wait until that is done, and close the channels."""
        self.closed = True
        for request_id in tuple(self._in_flight):
            self.finish(request_id, needs_cancel=True)
        if self._cancels:
            await asyncio.wait(self._cancels)
        for channel in self._channels:
            await channel.close()

    def _register(self, job: Call[Any] | GenerationSession) -> None:
        """Note that a job is in flight, if the server continues it after a lost connection."""
        if job.survives_disconnect and job.request_id is not None:
            self._in_flight[job.request_id] = job

    async def _cancel(self, job: Call[Any] | GenerationSession, stubs: Stubs) -> None:
        """Make one cancel call, to the server that has the job if its address is known."""
        ends_at = time.monotonic() + CANCEL_ON_EXIT_SECONDS
        message = generation_pb2.CancelGenerationRequest(request_id=job.request_id or "")

        async def call(stub: Any) -> None:
            timeout = ends_at - time.monotonic()
            # As in ``SyncTransport``: whatever the answer is, there is no second call.
            await stub.CancelGeneration(message, timeout=timeout, metadata=job.metadata).code()

        address = None
        if job.server_id:
            address = await asyncio.to_thread(
                server_address, job.server_id, self._settings.target, CANCEL_ON_EXIT_SECONDS / 2
            )
        if address is None:
            await call(stubs.generation)
        else:
            async with open_direct_async_channel(self._settings, address) as channel:
                await call(generation_pb2_grpc.GenerationServiceStub(channel))


def _try(call: Call[Any], stubs: Stubs) -> Any:
    return call.method(stubs)(call.message, timeout=call.timeout, metadata=call.metadata)


def being_cancelled() -> bool:
    """Whether somebody cancels the current task, rather than what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
