"""The asyncio client's I/O: its channels, its calls and their cancellation."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc

from darkroom.v1 import generation_pb2, generation_pb2_grpc
from darkroom_client._errors import DarkroomError
from darkroom_client._protocol.calls import upload_call
from darkroom_client._protocol.retries import Call, CallTries, NextCall, client_closed_error
from darkroom_client._protocol.rpc_errors import was_sent
from darkroom_client._protocol.session import GenerationSession
from darkroom_client._protocol.stubs import Stubs
from darkroom_client._settings import Metadata, Settings
from darkroom_client._transport.balanced import BalancedAsyncChannel
from darkroom_client._transport.channels import (
    CALLS_PER_PAIR,
    check_files,
    new_balancer,
    open_async_control_channel,
    open_async_pair,
    open_direct_async_channel,
)
from darkroom_client._transport.server_address import server_address
from darkroom_client._transport.sync import CANCEL_ON_EXIT_SECONDS
from darkroom_client._transport.tls_probe import find_tls_problem

A = TypeVar("A")


@dataclass(frozen=True, slots=True)
class _Pair:
    channels: tuple[
        grpc.aio.Channel | BalancedAsyncChannel, grpc.aio.Channel | BalancedAsyncChannel
    ]
    stubs: Stubs
    # One object for each open call.
    calls: set[object] = field(default_factory=set)


class AsyncTransport:
    """Like ``SyncTransport``, for the event loop of its first call, which gRPC ties it to.

    ``_in_flight``, ``_cancels`` and ``_sleepers`` are as there; only the event loop touches them.
    """

    def __init__(self, settings: Settings) -> None:
        check_files(settings.tls)
        self.closed = False
        self._settings = settings
        self._loop: asyncio.AbstractEventLoop | None = None
        self._balancer = new_balancer(settings)
        self._control: grpc.aio.Channel | BalancedAsyncChannel | None = None
        self._pairs: list[_Pair] = []
        self._in_flight: dict[str, Call[Any] | GenerationSession] = {}
        self._cancels: set[asyncio.Task[None]] = set()
        self._sleepers: set[asyncio.Event] = set()
        self._uploaded: set[str] = set()
        self._uploading = asyncio.Lock()

    @property
    def stubs(self) -> Stubs:
        """The services; the channels open at the first use."""
        self._connect()
        return self._pairs[0].stubs

    def _connect(self) -> None:
        self.check_open()
        if not self._pairs:
            self._loop = asyncio.get_running_loop()
            self._control = open_async_control_channel(self._settings, self._balancer)
            self._open()
        if self._loop is not asyncio.get_running_loop():
            raise RuntimeError("this client belongs to another event loop: make one in each")

    @property
    def connected(self) -> bool:
        """Whether there is a connection to a server now."""
        ready = grpc.ChannelConnectivity.READY
        return any(channel.get_state() is ready for channel in self._all_channels())

    async def run(self, call: Call[A]) -> A:
        """Make ``call`` and wait for its answer."""
        self._connect()
        self._register(call)
        tries = CallTries(call)
        needs_cancel = True
        try:
            while True:
                try:
                    following = tries.next_call()
                    if following.uploads:
                        await self.send(following, call.metadata)
                    response = await self._start(following, call.metadata)
                    break
                except grpc.RpcError as error:
                    if self.closed:
                        raise client_closed_error(call.request_id) from error
                    needs_cancel = tries.needs_cancel(error)
                    try:
                        pause = tries.on_failed(
                            error,
                            connected=self.connected,
                            tls_problem=await self.find_tls_problem(error, tries.remaining),
                        )
                    except DarkroomError as failure:
                        raise failure from error
                    needs_cancel = True
                await self.sleep(pause, asyncio.Event())
                if self.closed:
                    raise client_closed_error(call.request_id)
            needs_cancel = False
        except asyncio.CancelledError:
            if being_cancelled():
                raise
            # Nobody cancelled this task: the channel was closed during the call.
            raise client_closed_error(call.request_id) from None
        finally:
            self.finish(call.request_id, needs_cancel=needs_cancel)
        return call.decode(response)

    async def send(self, call: NextCall, metadata: Metadata) -> None:
        """Send the files of ``call`` that this client has not sent before, one at a time."""
        for upload in call.uploads:
            async with self._uploading:
                if upload.again or upload.upload_id not in self._uploaded:
                    await self.run(upload_call(upload, call, self._settings, metadata))
                    self._uploaded.add(upload.upload_id)

    def open_stream(self, session: GenerationSession, call: NextCall) -> Any:
        """Open the stream of ``call``; returns gRPC's call."""
        if self.closed:
            raise client_closed_error(session.request_id)
        self._register(session)
        return self._start(call, session.metadata)

    def _start(self, call: NextCall, metadata: Metadata) -> Any:
        stubs = self.stubs
        if call.control:
            return call.method(stubs)(call.message, timeout=call.timeout, metadata=metadata)
        pair = self._open()
        started = call.method(pair.stubs)(call.message, timeout=call.timeout, metadata=metadata)
        place = object()
        pair.calls.add(place)
        started.add_done_callback(lambda _: pair.calls.discard(place))
        return started

    def _open(self) -> _Pair:
        """A pair of channels with room for a call."""
        free = next((pair for pair in self._pairs if len(pair.calls) < CALLS_PER_PAIR), None)
        if free is None:
            channels = open_async_pair(self._settings, self._balancer)
            free = _Pair(channels, Stubs(*channels, self._control))
            self._pairs.append(free)
        return free

    def _all_channels(self) -> list[grpc.aio.Channel | BalancedAsyncChannel]:
        control = [] if self._control is None else [self._control]
        return control + [channel for pair in self._pairs for channel in pair.channels]

    async def find_tls_problem(self, error: grpc.RpcError, seconds: float) -> str:
        """Like ``SyncTransport.find_tls_problem``."""
        if self._settings.tls is None or was_sent(error):
            return ""
        return await asyncio.to_thread(find_tls_problem, self._settings, seconds)

    async def sleep(self, seconds: float, wake: asyncio.Event) -> None:
        """Wait until ``seconds`` have passed, ``wake`` is set, or the client is closed."""
        self._sleepers.add(wake)
        try:
            async with asyncio.timeout(seconds):
                await wake.wait()
        except TimeoutError:
            pass
        finally:
            self._sleepers.discard(wake)

    def finish(self, request_id: str | None, *, needs_cancel: bool) -> None:
        """Note that no caller waits for this job any more; cancel it if it needs that."""
        job = self._in_flight.pop(request_id, None) if request_id is not None else None
        if job is not None and needs_cancel and self._pairs:
            cancel = asyncio.ensure_future(self._cancel(job, self._pairs[0].stubs))
            self._cancels.add(cancel)
            cancel.add_done_callback(self._cancels.discard)

    def check_open(self) -> None:
        """Raise ``RuntimeError`` for a client that is closed."""
        if self.closed:
            raise RuntimeError("this client is closed")

    async def close(self) -> None:
        """Cancel every job in flight, wait until that is done, and close the channels."""
        self.closed = True
        for wake in self._sleepers:
            wake.set()
        for request_id in tuple(self._in_flight):
            self.finish(request_id, needs_cancel=True)
        if self._cancels:
            await asyncio.wait(self._cancels)
        for channel in self._all_channels():
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
            await call(stubs.control)
        else:
            async with open_direct_async_channel(self._settings, address) as channel:
                await call(generation_pb2_grpc.GenerationServiceStub(channel))


def being_cancelled() -> bool:
    """Whether somebody cancels the current task, rather than what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
