"""The context of each call: its request id, sent back; its trace; its caller's address."""

import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import Any

import structlog
from google.protobuf.message import Message

from darkroom.v1 import generation_pb2, load_pb2
from darkroom_server.core.caller import ANONYMOUS, Caller
from darkroom_server.core.errors import InvalidRequest, Violation
from darkroom_server.dispatch import Backlog, PeerAddresses
from darkroom_server.rpc.context import CURRENT_ADDRESS, Context, Metadata
from darkroom_server.rpc.interceptors.base import ContextInterceptor, Method
from darkroom_server.rpc.interceptors.receiving import caller_address
from darkroom_server.service.call_context import (
    CURRENT_CALL,
    REQUEST_ID,
    RULE,
    CallContext,
    new_request_id,
)
from darkroom_server.service.trace_context import new_trace, parse_traceparent
from darkroom_server.service.validation import ReplyLimit

REQUEST_ID_KEY = "darkroom-request-id"

RELAYED_KEY = "darkroom-relayed"
"""Metadata of a call that another server of the ledger makes for a caller of its own."""

TRACE_KEY = "traceparent"
FIELD = "request_id"

LOAD_KEY = "endpoint-load-metrics-bin"
"""The trailer with a load report, as gRPC's and Envoy's balancers read it (ORCA)."""

BACKLOG_KEY = "darkroom-backlog-seconds"
"""The same as text: gRPC's C core, and so Python, hides the other trailer from programs."""

BACKLOG = "darkroom_backlog_seconds"
GENERATION = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name

MAX_REPLY_BYTES_KEY = "darkroom-max-reply-bytes"
"""Metadata of a caller that raised its receive limit: a decimal number."""

DEFAULT_MAX_REPLY_BYTES = 4 * 1024**2
"""gRPC's default receive limit: a client with it fails on a larger reply, after the work."""


class CallContexts(ContextInterceptor):
    """Sets the ``CallContext`` of each call, and binds its ids into the log.

    The request id comes from the message or else from the metadata, and returns in the trailers:
    in headers it would end gRPC's retries. An id from the metadata is written into a message that
    has an empty field for it, so that it names the job too. The trace comes from the metadata;
    an invalid one is ignored, as W3C asks. With ``begin_traces``, a call without one begins one.
    The caller is ``anonymous``, with its address; ``Auth`` replaces it. At the end of a call of
    ``GenerationService`` the trailers also report the server's ``backlog``.
    """

    def __init__(
        self,
        addresses: PeerAddresses,
        anonymous: Caller = ANONYMOUS,
        backlog: Backlog | None = None,
        *,
        begin_traces: bool = False,
    ) -> None:
        self._addresses = addresses
        self._anonymous = anonymous
        self._backlog = backlog or Backlog()
        self._begin_traces = begin_traces

    def around(
        self, method: Method, context: Context, request: Any
    ) -> AbstractAsyncContextManager[None]:
        """Set the context; raises ``InvalidRequest`` for metadata that cannot be a request id."""
        return self._around(method, context, request)

    @asynccontextmanager
    async def _around(self, method: Method, context: Context, request: Any) -> AsyncIterator[None]:
        metadata = context.invocation_metadata() or ()
        sent = metadata_value(metadata, REQUEST_ID_KEY)
        message = _message_with_id(request)
        if message is not None and sent and _valid(sent) and not getattr(message, FIELD):
            setattr(message, FIELD, sent)
        asked = getattr(message, FIELD) if message is not None else sent
        id = asked if asked and _valid(asked) else new_request_id()
        traceparent = metadata_value(metadata, TRACE_KEY)
        trace = parse_traceparent(traceparent) if traceparent else None
        if trace is None and self._begin_traces:
            trace = new_trace()
        # ``Receiving`` sets it, unless the caller streams its messages.
        address = CURRENT_ADDRESS.get("") or caller_address(self._addresses, context)
        caller = replace(self._anonymous, address=address)
        relayed = metadata_value(metadata, RELAYED_KEY) is not None
        CURRENT_CALL.set(CallContext(id, caller, trace, relayed=relayed))
        structlog.contextvars.bind_contextvars(request_id=id)
        if trace is not None:
            structlog.contextvars.bind_contextvars(trace_id=trace.trace_id)
        context.set_trailing_metadata(((REQUEST_ID_KEY, id),))
        if sent is not None and not _valid(sent):
            # Not ignored: the caller would not find the call, or the job, under this id.
            raise InvalidRequest([Violation(REQUEST_ID_KEY, f"metadata: {RULE}")])
        try:
            yield
        finally:
            if method.service == GENERATION:
                # Attributes only, no call into other files: this is on the way of every request.
                finish_at = max(self._backlog.finish_at.values(), default=0.0)
                seconds = max(0.0, finish_at - time.monotonic())
                report = load_pb2.LoadReport(named_metrics={BACKLOG: seconds})
                context.set_trailing_metadata(
                    (
                        (REQUEST_ID_KEY, id),
                        (LOAD_KEY, report.SerializeToString()),
                        (BACKLOG_KEY, f"{seconds:.3f}"),
                    )
                )


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


def metadata_value(metadata: Metadata, key: str) -> str | None:
    """The first value of ``key`` in a call's metadata, None if there is none."""
    for name, value in metadata:
        if name == key:
            return value.decode("ascii", "replace") if isinstance(value, bytes) else value
    return None


def reply_limit(metadata: Metadata) -> ReplyLimit:
    """What the caller accepts in one message; raises ``InvalidRequest``."""
    limit = DEFAULT_MAX_REPLY_BYTES
    text = metadata_value(metadata, MAX_REPLY_BYTES_KEY)
    if text is not None:
        if not (text.isascii() and text.isdecimal() and len(text) <= 18):
            wrong = Violation(MAX_REPLY_BYTES_KEY, "metadata: must be a number of bytes")
            raise InvalidRequest([wrong])
        limit = int(text)
    advice = f"raise the client's gRPC receive limit and send it as metadata {MAX_REPLY_BYTES_KEY}"
    return ReplyLimit(limit, advice)
