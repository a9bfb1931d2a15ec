"""Lets log entries of a call be found by the trace that the caller keeps of it."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import structlog

from darkroom_server.rpc.context import Context, metadata_value
from darkroom_server.rpc.interceptors.base import ContextInterceptor, Method
from darkroom_server.rpc.trace_context import new_trace, parse_traceparent, set_trace

METADATA_KEY = "traceparent"


class Traces(ContextInterceptor):
    """Binds the caller's ``trace_id`` into the log; ignores what is none, as W3C says.

    With ``begin`` a call without a trace begins one.
    """

    def __init__(self, *, begin: bool = False) -> None:
        self._begin = begin

    def around(
        self, method: Method, context: Context, request: Any
    ) -> AbstractAsyncContextManager[None]:
        """Read the metadata."""
        return self._around(context)

    @asynccontextmanager
    async def _around(self, context: Context) -> AsyncIterator[None]:
        trace = parse_traceparent(metadata_value(context, METADATA_KEY) or "")
        if trace is None and self._begin:
            trace = new_trace()
        if trace is not None:
            set_trace(trace)
            structlog.contextvars.bind_contextvars(trace_id=trace.trace_id)
        yield
