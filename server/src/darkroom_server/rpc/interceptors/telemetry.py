"""What every gRPC dashboard wants to know of each call."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

from darkroom_server.rpc.context import Context, has_expired, status_name
from darkroom_server.rpc.interceptors.base import ContextInterceptor, Method


class CallObserver(Protocol):
    """Is told of each call, on the event loop; its methods return at once and never raise."""

    def call_started(self, service: str, method: str, kind: str) -> None:
        """A call begins; ``kind`` as in ``Method``."""

    def call_handled(self, service: str, method: str, kind: str, code: str, seconds: float) -> None:
        """It ended with the status ``code``, such as "OK"."""

    def message(self, service: str, method: str, kind: str, size: int, *, sent: bool) -> None:
        """A message of ``size`` bytes came, or was ``sent``."""


class Telemetry(ContextInterceptor):
    """Tells an observer when calls begin and how they end. Methods that nobody serves are left out.

    It must surround ``Errors``, to see the status that is sent.
    """

    def __init__(self, observer: CallObserver) -> None:
        self._observer = observer

    def around(
        self, method: Method, context: Context, request: Any
    ) -> AbstractAsyncContextManager[None]:
        """Time the call."""
        return self._around(method, context)

    def deserializer(
        self, method: Method, deserialize: Callable[[bytes], Any] | None
    ) -> Callable[[bytes], Any]:
        """Measure each message that comes."""

        def measured(data: bytes) -> Any:
            self._observer.message(*_named(method), len(data), sent=False)
            return data if deserialize is None else deserialize(data)

        return measured

    def serializer(
        self, method: Method, serialize: Callable[[Any], bytes] | None
    ) -> Callable[[Any], bytes]:
        """Measure each message that is sent."""

        def measured(message: Any) -> bytes:
            data: bytes = message if serialize is None else serialize(message)
            self._observer.message(*_named(method), len(data), sent=True)
            return data

        return measured

    @asynccontextmanager
    async def _around(self, method: Method, context: Context) -> AsyncIterator[None]:
        began = time.monotonic()
        named = _named(method)
        self._observer.call_started(*named)
        code = "OK"
        try:
            yield
            code = status_name(context) or "OK"
        except (asyncio.CancelledError, GeneratorExit):
            code = "DEADLINE_EXCEEDED" if has_expired(context) else "CANCELLED"
            raise
        except BaseException:
            # A status that was set counts, though it may have come too late to be sent.
            code = status_name(context) or "UNKNOWN"
            raise
        finally:
            self._observer.call_handled(*named, code, time.monotonic() - began)


def _named(method: Method) -> tuple[str, str, str]:
    return (method.service, method.name, method.kind)
