"""The context of each call: its request id, sent back to the caller, and its trace."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import structlog
from google.protobuf.message import Message

from darkroom_server.core.errors import InvalidRequest, Violation
from darkroom_server.rpc.context import Context
from darkroom_server.rpc.interceptors.base import ContextInterceptor, Method
from darkroom_server.service.call_context import (
    CURRENT_CALL,
    REQUEST_ID,
    RULE,
    CallContext,
    new_request_id,
)
from darkroom_server.service.trace_context import new_trace, parse_traceparent

REQUEST_ID_KEY = "darkroom-request-id"
TRACE_KEY = "traceparent"
FIELD = "request_id"


class CallContexts(ContextInterceptor):
    """Sets the ``CallContext`` of each call, and binds its ids into the log.

    The request id comes from the message or else from the metadata, and returns in the trailers:
    in headers it would end gRPC's retries. An id from the metadata is written into a message that
    has an empty field for it, so that it names the job too. The trace comes from the metadata;
    an invalid one is ignored, as W3C asks. With ``begin_traces``, a call without one begins one.
    """

    def __init__(self, *, begin_traces: bool = False) -> None:
        self._begin_traces = begin_traces

    def around(
        self, method: Method, context: Context, request: Any
    ) -> AbstractAsyncContextManager[None]:
        """Set the context; raises ``InvalidRequest`` for metadata that cannot be a request id."""
        return self._around(context, request)

    @asynccontextmanager
    async def _around(self, context: Context, request: Any) -> AsyncIterator[None]:
        metadata = dict(context.invocation_metadata() or ())
        sent = _text(metadata.get(REQUEST_ID_KEY))
        message = _message_with_id(request)
        if message is not None and sent and _valid(sent) and not getattr(message, FIELD):
            setattr(message, FIELD, sent)
        asked = getattr(message, FIELD) if message is not None else sent
        id = asked if asked and _valid(asked) else new_request_id()
        traceparent = _text(metadata.get(TRACE_KEY))
        trace = parse_traceparent(traceparent) if traceparent else None
        if trace is None and self._begin_traces:
            trace = new_trace()
        CURRENT_CALL.set(CallContext(id, trace=trace))
        structlog.contextvars.bind_contextvars(request_id=id)
        if trace is not None:
            structlog.contextvars.bind_contextvars(trace_id=trace.trace_id)
        context.set_trailing_metadata(((REQUEST_ID_KEY, id),))
        if sent is not None and not _valid(sent):
            # Not ignored: the caller would not find the call, or the job, under this id.
            raise InvalidRequest([Violation(REQUEST_ID_KEY, f"metadata: {RULE}")])
        yield


def _text(value: str | bytes | None) -> str | None:
    return value.decode("ascii", "replace") if isinstance(value, bytes) else value


def _valid(request_id: str) -> bool:
    return REQUEST_ID.fullmatch(request_id) is not None


def _message_with_id(request: Any) -> Message | None:
    """The message that names the call's job: itself, or the generation inside."""
    if not isinstance(request, Message):
        return None  # A stream of messages.
    fields = request.DESCRIPTOR.fields_by_name
    if FIELD in fields:
        return request
    if "generation" in fields:
        return _message_with_id(request.generation)  # type: ignore[attr-defined]
    return None
