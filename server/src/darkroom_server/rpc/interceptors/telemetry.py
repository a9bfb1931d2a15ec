"""Counts, times and sizes of each call, for the usual gRPC metrics."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

import grpc

from darkroom_server.rpc.context import CURRENT_ANSWER, Answer, Context, has_expired
from darkroom_server.rpc.interceptors.base import ContextInterceptor, Method


class CallObserver(Protocol):
    """Records calls, on the event loop, without blocking and without raising."""

    def call_started(self, service: str, method: str, kind: str) -> None:
        """A call begins; ``kind`` as in ``Method``."""

    def call_handled(self, service: str, method: str, kind: str, code: str, seconds: float) -> None:
        """It ended with the status ``code``, such as "OK"."""

    def message(self, service: str, method: str, kind: str, size: int, *, sent: bool) -> None:
        """A message of ``size`` bytes was received, or ``sent``."""


class Telemetry(ContextInterceptor):
    """Reports to an observer when calls begin and how they end; unknown methods are left out.

    Outside ``Errors``, to see the status that is sent.
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
        """Measure each received message."""

        def measured(data: bytes) -> Any:
            self._observer.message(*_named(method), len(data), sent=False)
            return data if deserialize is None else deserialize(data)

        return measured

    def serializer(
        self, method: Method, serialize: Callable[[Any], bytes] | None
    ) -> Callable[[Any], bytes]:
        """Measure each sent message; one that another server serialized stays as it is."""

        def measured(message: Any) -> bytes:
            if serialize is None or isinstance(message, bytes):
                data: bytes = message
            else:
                data = serialize(message)
            self._observer.message(*_named(method), len(data), sent=True)
            return data

        return measured

    @asynccontextmanager
    async def _around(self, method: Method, context: Context) -> AsyncIterator[None]:
        began = time.monotonic()
        named = _named(method)
        self._observer.call_started(*named)
        answer = Answer()
        CURRENT_ANSWER.set(answer)
        code = "OK"
        try:
            yield
            code = status_name(context) or "OK"
        except (asyncio.CancelledError, GeneratorExit):
            if not answer.complete:
                code = status_name(context) or (
                    "DEADLINE_EXCEEDED" if has_expired(context) else "CANCELLED"
                )
            raise
        except BaseException:
            # A status that was set counts, even if it was too late to be sent.
            code = status_name(context) or "UNKNOWN"
            raise
        finally:
            self._observer.call_handled(*named, code, time.monotonic() - began)


def _named(method: Method) -> tuple[str, str, str]:
    return (method.service, method.name, method.kind)


def status_name(context: Context) -> str | None:
    """The name of the status that was set, such as "NOT_FOUND"; None if none was."""
    code: Any = context.code()  # As it was set: a StatusCode, or its number.
    if isinstance(code, grpc.StatusCode):
        return code.name
    return _STATUS_NAMES.get(code)


_STATUS_NAMES: dict[object, str] = {code.value[0]: code.name for code in grpc.StatusCode}
