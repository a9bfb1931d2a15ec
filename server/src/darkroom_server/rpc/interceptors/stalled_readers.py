"""Streams whose reader stalls: their calls are aborted, so that their places become free."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from typing import Any

import grpc
import structlog

from darkroom_server.core.caller import Caller
from darkroom_server.core.errors import QuotaExceeded, ReaderStalled
from darkroom_server.dispatch import counted_as, quota_subject
from darkroom_server.rpc.context import Context
from darkroom_server.rpc.errors import status_of
from darkroom_server.rpc.interceptors.base import ContextInterceptor, Method
from darkroom_server.service.call_context import CURRENT_CALL

log = structlog.get_logger(__name__)

STALL_SECONDS = 60.0
"""A message that gRPC cannot send for this long is one that nobody reads."""

MAX_STALLED = 64
"""Aborted streams of one caller that are still open: each keeps a message of up to 512 KiB.

gRPC sends the status after that message, so such a stream ends when its reader continues or its
connection closes.
"""


class StalledReaders(ContextInterceptor):
    """Aborts a stream that blocks for ``STALL_SECONDS``. Inside ``Errors``, with a known caller."""

    kinds = frozenset({"server_stream", "bidi_stream"})

    def __init__(self) -> None:
        self._stalled: Counter[str] = Counter()
        self._aborts: set[asyncio.Task[None]] = set()

    def around(
        self, method: Method, context: Context, request: Any
    ) -> AbstractAsyncContextManager[None]:
        """Nothing more than ``_wrapped`` does."""
        return nullcontext()

    def _wrapped(self, behaviour: Callable[..., Any], method: Method) -> Callable[..., Any]:
        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            loop, task = asyncio.get_running_loop(), asyncio.current_task()
            caller = CURRENT_CALL.get().caller
            self._check(caller)
            begun = False
            async with aclosing(behaviour(request, context)) as responses:
                async for response in responses:
                    timer = loop.call_later(
                        STALL_SECONDS, self._abort, method, caller, context, task
                    )
                    try:
                        if not begun:
                            await _send_headers(context)
                            begun = True
                        yield response
                    finally:
                        timer.cancel()

        return stream

    def _check(self, caller: Caller) -> None:
        if self._stalled[counted_as(caller)] >= MAX_STALLED:
            raise QuotaExceeded(
                quota_subject(caller),
                f"{MAX_STALLED} streams of {counted_as(caller)!r} were ended because nobody reads "
                "them, and are still open; read them to the end, or close their connections",
            )

    def _abort(
        self, method: Method, caller: Caller, context: Context, task: "asyncio.Task[Any] | None"
    ) -> None:
        log.warning("reader stalled", service=method.service, method=method.name)
        if task is not None:
            task.cancel()  # It waits for the reader; its handler ends, and its place is free.
        abort = asyncio.create_task(self._send_status(caller, context))
        self._aborts.add(abort)
        abort.add_done_callback(self._aborts.discard)

    async def _send_status(self, caller: Caller, context: Context) -> None:
        """Send the status, which waits for the reader too; the stream is counted until then."""
        key = counted_as(caller)
        self._stalled[key] += 1
        error = ReaderStalled(
            f"nobody read this stream for {STALL_SECONDS:g} s; follow its job with another call",
            retry_after=1.0,
        )
        try:
            await context.abort_with_status(status_of(error))
        except (grpc.aio.AbortError, grpc.aio.InternalError):
            pass  # Sent; or the caller has disconnected.
        finally:
            self._stalled[key] -= 1
            if not self._stalled[key]:
                del self._stalled[key]


async def _send_headers(context: Context) -> None:
    """Send them before the first message: the status of an aborted call needs them to be sent."""
    try:
        await context.send_initial_metadata(())
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None  # The caller has disconnected.
