"""Undecodable requests are INVALID_ARGUMENT."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError

from darkroom_server.core.errors import InvalidRequest, Violation
from darkroom_server.rpc.context import Context
from darkroom_server.rpc.interceptors.base import ContextInterceptor, Method

if TYPE_CHECKING:
    from darkroom_server.rpc.interceptors.base import Deserializer


class Undecodable:
    """A request whose bytes are not a message."""


UNDECODABLE = Undecodable()


class Decoding(ContextInterceptor):
    """Raises ``InvalidRequest`` for undecodable messages, text that is not UTF-8 included.

    gRPC itself would answer UNKNOWN, with the text of the exception. The innermost interceptor:
    the others see such a request as ``Undecodable``.
    """

    def deserializer(self, method: Method, deserialize: "Deserializer") -> "Deserializer":
        """As ``deserialize``, but never fails."""
        if deserialize is None:
            return None

        def try_to_decode(message: bytes) -> Any:
            try:
                return deserialize(message)
            except DecodeError:
                return UNDECODABLE

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
    if isinstance(request, Undecodable):
        wrong = Violation("request", "must be a message of the method's type, with texts in UTF-8")
        raise InvalidRequest([wrong])
