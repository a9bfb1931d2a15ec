"""Interceptors as context managers around the handler, for every kind of call."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from darkroom_server.rpc.context import Context

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]
    Deserializer = Callable[[bytes], Any] | None
    Serializer = Callable[[Any], bytes] | None


@dataclass(frozen=True, slots=True)
class Method:
    """A method that is being called; ``kind`` is "unary" or one of the three streaming ones."""

    service: str
    name: str
    kind: str


class ContextInterceptor(grpc.aio.ServerInterceptor, ABC):
    """Runs a subclass's ``around`` around each handler, on the handler's own task.

    ``kinds``: the kinds of methods that it concerns.
    """

    kinds = frozenset({"unary", "server_stream", "client_stream", "bidi_stream"})

    @abstractmethod
    def around(
        self, method: Method, context: Context, request: Any
    ) -> AbstractAsyncContextManager[None]:
        """Entered before the handler and exited after it, with its exception if it raised one.

        ``request`` is the message, or an iterator where the caller streams them.
        """

    def deserializer(self, method: Method, deserialize: "Deserializer") -> "Deserializer":
        """Decodes a request; a subclass may wrap it."""
        return deserialize

    def serializer(self, method: Method, serialize: "Serializer") -> "Serializer":
        """Encodes a response; a subclass may wrap it."""
        return serialize

    async def intercept_service(
        self,
        # The types' brackets are in the stubs only.
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the handler of one call; an unknown method has none."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        _, service, name = handler_call_details.method.split("/")
        requests = "stream" if handler.request_streaming else "unary"
        responses = "stream" if handler.response_streaming else "unary"
        kind = _KINDS[requests, responses]
        if kind not in self.kinds:
            return handler
        behaviour = getattr(handler, f"{requests}_{responses}")
        make = getattr(grpc, f"{requests}_{responses}_rpc_method_handler")
        method = Method(service, name, kind)
        return make(
            self._wrapped(behaviour, method),
            request_deserializer=self.deserializer(method, handler.request_deserializer),
            response_serializer=self.serializer(method, handler.response_serializer),
        )

    def _wrapped(self, behaviour: Callable[..., Any], method: Method) -> Callable[..., Any]:
        # A streaming handler either yields its responses or writes them to the context.
        if inspect.isasyncgenfunction(behaviour):

            async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
                # Closed at once when the caller goes away, and not when it is collected.
                async with (
                    self.around(method, context, request),
                    aclosing(behaviour(request, context)) as responses,
                ):
                    async for response in responses:
                        yield response

            return stream

        async def call(request: Any, context: Context) -> Any:
            async with self.around(method, context, request):
                return await behaviour(request, context)

        return call


_KINDS = {
    ("unary", "unary"): "unary",
    ("unary", "stream"): "server_stream",
    ("stream", "unary"): "client_stream",
    ("stream", "stream"): "bidi_stream",
}
