"""The asyncio client's I/O: its channels, and who waits for what over them."""

import asyncio
from typing import Any, TypeVar

import grpc

from darkroom_client._protocol.call import Call, closed_under
from darkroom_client._protocol.calls import Calls
from darkroom_client._protocol.session import MAX_BACKENDS_PROBED, GenerationSession, NextCall
from darkroom_client._protocol.stubs import Stubs
from darkroom_client._settings import Metadata, Settings
from darkroom_client._transport.channels import check_files, open_async_channels
from darkroom_client._transport.sync import CANCEL_ON_EXIT_SECONDS

A = TypeVar("A")


class AsyncTransport:
    """As ``SyncTransport``, for the event loop of its first call, which gRPC ties it to."""

    def __init__(self, settings: Settings, calls: Calls) -> None:
        check_files(settings.tls)
        self.closed = False
        self._settings = settings
        self._calls = calls
        self._loop: asyncio.AbstractEventLoop | None = None
        self._channels: tuple[grpc.aio.Channel, ...] = ()
        self._stubs: Stubs | None = None
        self._kept: dict[str, Metadata] = {}
        self._farewells: set[asyncio.Future[None]] = set()

    @property
    def stubs(self) -> Stubs:
        """The services; the channels open here, at the first use."""
        self.check_open()
        if self._stubs is None:
            self._loop = asyncio.get_running_loop()
            checked, plain = open_async_channels(self._settings)
            self._channels = (checked, plain)
            self._stubs = Stubs(checked, plain)
        if self._loop is not asyncio.get_running_loop():
            raise RuntimeError("this client belongs to another event loop: make one in each")
        return self._stubs

    async def ask(self, call: Call[A]) -> A:
        """Make ``call`` and wait for its answer."""
        stubs = self.stubs
        if call.survives_disconnect and call.request_id is not None:
            self._kept[call.request_id] = call.metadata
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
            # Nobody cancelled this task: the channel was closed under the call.
            raise closed_under(call.request_id) from None
        finally:
            self.settle(call.request_id, needs_cancel=needs_cancel)
        return call.decode(response)

    async def _answer(self, call: Call[Any], stubs: Stubs) -> Any:
        """What one try of ``call`` brings, or two."""
        ends_at = call.ends_at()
        try:
            return await _try(call, stubs)
        except grpc.RpcError as error:
            again = call.again(error, ends_at)
            if again is None or self.closed:
                raise
        return await _try(again, stubs)

    def follow(self, session: GenerationSession, attempt: NextCall) -> Any:
        """Open the stream of ``attempt``."""
        if self.closed:
            raise closed_under(session.request_id)
        if session.needs_cancel:
            self._kept[session.request_id] = session.metadata
        return attempt.method(self.stubs)(
            attempt.message, timeout=attempt.timeout, metadata=session.metadata
        )

    def settle(self, request_id: str | None, *, needs_cancel: bool) -> None:
        """Nobody waits for this job any more; the server is told where it would not notice."""
        metadata = self._kept.pop(request_id, None) if request_id is not None else None
        if request_id is not None and metadata is not None and needs_cancel and not self.closed:
            self._cancel_on_exit(request_id, metadata)

    def check_open(self) -> None:
        """Raise ``RuntimeError`` for a client that is closed."""
        if self.closed:
            raise RuntimeError("this client is closed")

    async def close(self) -> None:
        """Tell the server which jobs nobody waits for any more, then close the channels."""
        if not self.closed:
            for request_id, metadata in tuple(self._kept.items()):
                self._cancel_on_exit(request_id, metadata)
            self.closed = True
        # The server may be gone, and the job with it.
        await asyncio.gather(*self._farewells, return_exceptions=True)
        for channel in self._channels:
            await channel.close()

    def _cancel_on_exit(self, request_id: str, metadata: Metadata) -> None:
        cancel_on_exit = asyncio.ensure_future(
            self._cancel_somewhere(request_id, metadata, self.stubs)
        )
        self._farewells.add(cancel_on_exit)
        cancel_on_exit.add_done_callback(self._farewells.discard)

    async def _cancel_somewhere(self, request_id: str, metadata: Metadata, stubs: Stubs) -> None:
        """Cancel a job at whichever of the servers behind the target has it."""
        call = self._calls.cancel_on_exit(request_id, CANCEL_ON_EXIT_SECONDS, metadata)
        # As in ``SyncTransport``: all at once the second time.
        for count in (1, MAX_BACKENDS_PROBED):
            running = [_try(call, stubs) for _ in range(count)]
            codes = await asyncio.gather(*(each.code() for each in running))
            if any(code is not grpc.StatusCode.NOT_FOUND for code in codes):
                return


def _try(call: Call[Any], stubs: Stubs) -> Any:
    return call.method(stubs)(call.message, timeout=call.timeout, metadata=call.metadata)


def being_cancelled() -> bool:
    """Whether somebody cancels the current task, rather than what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
