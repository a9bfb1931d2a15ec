"""Receives requests within limits, and decodes them."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    aclosing,
    asynccontextmanager,
    contextmanager,
)
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError

from darkroom_server.core.errors import (
    DarkroomError,
    DeadlineExceeded,
    InvalidRequest,
    QuotaExceeded,
    Unauthenticated,
    Violation,
)
from darkroom_server.dispatch import PeerAddresses
from darkroom_server.rpc.context import CURRENT_ADDRESS, Context, Metadata
from darkroom_server.rpc.dropped_calls import DroppedCalls
from darkroom_server.rpc.interceptors.base import ContextInterceptor, Method

if TYPE_CHECKING:
    from darkroom_server.rpc.interceptors.base import Deserializer, Handler

MESSAGE_SECONDS = 20.0
"""The most that a message may take to arrive, its wait for a place included."""

MAX_RECEIVING = 128
"""Messages that are received at once, in the process: each may take 1 MiB before it is complete."""

MAX_RECEIVING_PER_ADDRESS = 16
"""So that slow messages from one address delay no other address."""

MAX_OPEN = 4096
"""Open calls without a valid token, in the process."""

MAX_OPEN_PER_ADDRESS = 2048

FORWARDED_FOR = "x-forwarded-for"


class Rejected:
    """Takes the place of a request that was not received, or cannot be decoded.

    It passes through the interceptors like a message, so that the call is counted and gets its
    request id; the innermost one raises ``error``.
    """

    def __init__(self, error: DarkroomError) -> None:
        self.error = error


def caller_address(addresses: PeerAddresses, context: Context) -> str:
    """The address of a call's caller."""
    return peer_address(addresses, context.peer(), context.invocation_metadata() or ())


def peer_address(addresses: PeerAddresses, peer: str, metadata: Metadata) -> str:
    """A caller's address; ``peer`` is gRPC's name of the other end, such as "ipv4:1.2.3.4:80"."""
    forwarded = [str(value) for name, value in metadata if name == FORWARDED_FOR]
    kind, _, address = peer.partition(":")
    return addresses.address_of(unquote(address), forwarded) or kind  # Such as "unix".


def _undecodable() -> Rejected:
    wrong = Violation("request", "must be a message of the method's type, with texts in UTF-8")
    return Rejected(InvalidRequest([wrong]))


class MetadataCheck(Protocol):
    """Decides by a call's metadata alone whether it has a valid token."""

    def __call__(self, service: str, metadata: Any, /) -> bool:
        """True if the token is valid, and may call ``service``."""


class Receiving(grpc.aio.ServerInterceptor):
    """Reads the message of each unary request, within limits; the outermost interceptor.

    gRPC itself would read it before any interceptor runs, for any caller, and without a time limit.
    ``addresses`` finds the address of a call's caller, for the interceptors inside too.
    ``has_token`` is None if no tokens are needed. A service of ``open_services`` needs none in any
    case. Each call is counted as seen in
    ``dropped_calls``.
    """

    def __init__(
        self,
        addresses: PeerAddresses,
        has_token: MetadataCheck | None,
        open_services: frozenset[str],
        dropped_calls: DroppedCalls,
    ) -> None:
        self._dropped_calls = dropped_calls
        self._addresses = addresses
        self._has_token = has_token
        self._open_services = open_services
        self._open: Counter[str] = Counter()
        self._receiving = asyncio.Semaphore(MAX_RECEIVING)
        self._receiving_from: dict[str, asyncio.Semaphore] = {}
        self._reading: Counter[str] = Counter()
        self._reads: set[asyncio.Task[Any]] = set()

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Replace the handler of a unary request by one that reads the message itself."""
        self._dropped_calls.seen += 1
        handler: Any = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        _, service, _ = handler_call_details.method.split("/")
        decode = handler.request_deserializer
        if handler.response_streaming:

            async def stream(messages: Any, context: Context) -> AsyncIterator[Any]:
                address = self._address_of(context)
                with self._place(service, address, context) as error:
                    request = await self._request(address, context, decode, error)
                    async with aclosing(handler.unary_stream(request, context)) as responses:
                        async for response in responses:
                            yield response

            return grpc.stream_stream_rpc_method_handler(
                stream, response_serializer=handler.response_serializer
            )

        async def call(messages: Any, context: Context) -> Any:
            address = self._address_of(context)
            with self._place(service, address, context) as error:
                request = await self._request(address, context, decode, error)
                return await handler.unary_unary(request, context)

        return grpc.stream_unary_rpc_method_handler(
            call, response_serializer=handler.response_serializer
        )

    @contextmanager
    def _place(
        self, service: str, address: str, context: Context
    ) -> Iterator[DarkroomError | None]:
        """Count a call without a valid token while it is open; why it is rejected, or None."""
        metadata = context.invocation_metadata() or ()
        if self._has_token is not None and self._has_token(service, metadata):
            yield None
            return
        if self._open.total() >= MAX_OPEN or self._open[address] >= MAX_OPEN_PER_ADDRESS:
            why = "too many calls without a token are open; end some of them, or try again later"
            yield QuotaExceeded(f"address:{address}", why, 1.0)
            return
        self._open[address] += 1
        try:
            needs_token = self._has_token is not None and service not in self._open_services
            yield Unauthenticated("this call needs a valid token") if needs_token else None
        finally:
            self._open[address] -= 1
            if not self._open[address]:
                del self._open[address]

    def _address_of(self, context: Context) -> str:
        address = caller_address(self._addresses, context)
        CURRENT_ADDRESS.set(address)
        return address

    async def _request(
        self, address: str, context: Context, decode: Any, error: DarkroomError | None
    ) -> Any:
        """The decoded message, or what takes its place."""
        if error is not None:
            return Rejected(error)
        # Never cancelled: gRPC writes to the memory of a read that is under way. It ends with the
        # call at the latest.
        read = asyncio.create_task(self._read(address, context))
        self._reads.add(read)
        read.add_done_callback(self._forget)
        done, _ = await asyncio.wait({read}, timeout=MESSAGE_SECONDS)
        if not done:
            return Rejected(
                DeadlineExceeded(f"the request did not arrive within {MESSAGE_SECONDS:g} s")
            )
        message = read.result()
        return _undecodable() if message is None else decode(message)

    async def _read(self, address: str, context: Context) -> bytes | None:
        """The message's bytes; None if the caller ends the call without one."""
        places = self._receiving_from.setdefault(
            address, asyncio.Semaphore(MAX_RECEIVING_PER_ADDRESS)
        )
        self._reading[address] += 1
        try:
            async with places, self._receiving:
                message: Any = await context.read()
                return None if message is grpc.aio.EOF else message
        finally:
            self._reading[address] -= 1
            if not self._reading[address]:
                del self._reading[address], self._receiving_from[address]

    def _forget(self, read: "asyncio.Task[Any]") -> None:
        self._reads.discard(read)
        if not read.cancelled():
            read.exception()  # Of a call that ended first; any other raises it in ``_request``.


class Decoding(ContextInterceptor):
    """Raises ``InvalidRequest`` for undecodable messages, text that is not UTF-8 included.

    gRPC itself would answer UNKNOWN, with the text of the exception. The innermost interceptor:
    the others see such a request as ``Rejected``.
    """

    def deserializer(self, method: Method, deserialize: "Deserializer") -> "Deserializer":
        """As ``deserialize``, but never fails."""
        if deserialize is None:
            return None

        def try_to_decode(message: bytes) -> Any:
            try:
                return deserialize(message)
            except DecodeError:
                return _undecodable()

        return try_to_decode

    def around(
        self, method: Method, context: Context, request: Any
    ) -> AbstractAsyncContextManager[None]:
        """Check a single message; those of a stream are checked as they arrive."""
        return self._around(request)

    @asynccontextmanager
    async def _around(self, request: Any) -> AsyncIterator[None]:
        _check(request)
        yield

    def _wrapped(self, behaviour: Callable[..., Any], method: Method) -> Callable[..., Any]:
        if method.kind in ("unary", "server_stream"):
            return super()._wrapped(behaviour, method)

        if method.kind == "client_stream":

            async def call(requests: AsyncIterator[Any], context: Context) -> Any:
                return await behaviour(_checked(requests), context)

            return call

        async def stream(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
            async with aclosing(behaviour(_checked(requests), context)) as responses:
                async for response in responses:
                    yield response

        return stream


async def _checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        _check(request)
        yield request


def _check(request: Any) -> None:
    if isinstance(request, Rejected):
        raise request.error
