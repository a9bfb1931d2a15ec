"""The context of each call: its request id, sent back; its trace; its caller's address."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any
from urllib.parse import unquote

import structlog
from google.protobuf.message import Message

from darkroom_server.core.caller import ANONYMOUS, Caller
from darkroom_server.core.errors import InvalidRequest, Violation
from darkroom_server.rpc.context import Context, Metadata
from darkroom_server.rpc.interceptors.base import ContextInterceptor, Method
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
TRACE_KEY = "traceparent"
FIELD = "request_id"
FORWARDED_FOR = "x-forwarded-for"

MAX_REPLY_BYTES_KEY = "darkroom-max-reply-bytes"
"""Metadata of a caller that raised its receive limit: a decimal number."""

DEFAULT_MAX_REPLY_BYTES = 4 * 1024**2
"""gRPC's default receive limit: a client with it fails on a larger reply, after the work."""

IPV6_PREFIX = 64
"""One subscriber has at least this network, so its addresses count as one."""

Address = IPv4Address | IPv6Address


class PeerAddresses:
    """Finds callers' addresses; ``trusted``: networks of proxies, separated by commas."""

    def __init__(self, trusted: str | None = None) -> None:
        self._trusted = [ip_network(each.strip()) for each in trusted.split(",")] if trusted else []

    def address_of(self, peer: str, metadata: Metadata) -> str:
        """The caller's address; ``peer`` is gRPC's name of the other end, such as "ipv4:::1:80".

        Behind a trusted proxy: the last address in ``x-forwarded-for`` that is not one of a
        trusted proxy, because all entries before it may be invented.
        """
        found = _parse(unquote(peer.partition(":")[2]))
        if found is None:
            return peer.partition(":")[0]  # Such as "unix".
        if self._is_proxy(found):
            sent = [str(value) for name, value in metadata if name == FORWARDED_FOR]
            for entry in reversed(",".join(sent).split(",")):
                address = _parse(entry.strip())
                if address is None:
                    break
                found = address
                if not self._is_proxy(found):
                    break
        return _counted(found)

    def of_call(self, context: Context) -> str:
        """The address of a call's caller."""
        return self.address_of(context.peer(), context.invocation_metadata() or ())

    def _is_proxy(self, address: Address) -> bool:
        return any(address in network for network in self._trusted)


def _parse(text: str) -> Address | None:
    """The address in "1.2.3.4", "1.2.3.4:80", "::1" or "[::1]:80"; None if there is none."""
    for host in (text, text.rpartition(":")[0], text.rpartition(":")[0].strip("[]")):
        try:
            address = ip_address(host.strip("[]"))
        except ValueError:
            continue
        mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
        return mapped or address
    return None


def _counted(address: Address) -> str:
    if isinstance(address, IPv6Address) and not address.is_loopback:
        return str(IPv6Network((address, IPV6_PREFIX), strict=False))
    return str(address)


class CallContexts(ContextInterceptor):
    """Sets the ``CallContext`` of each call, and binds its ids into the log.

    The request id comes from the message or else from the metadata, and returns in the trailers:
    in headers it would end gRPC's retries. An id from the metadata is written into a message that
    has an empty field for it, so that it names the job too. The trace comes from the metadata;
    an invalid one is ignored, as W3C asks. With ``begin_traces``, a call without one begins one.
    The caller is ``anonymous``, with its address; ``Auth`` replaces it.
    """

    def __init__(
        self, addresses: PeerAddresses, anonymous: Caller = ANONYMOUS, *, begin_traces: bool = False
    ) -> None:
        self._addresses = addresses
        self._anonymous = anonymous
        self._begin_traces = begin_traces

    def around(
        self, method: Method, context: Context, request: Any
    ) -> AbstractAsyncContextManager[None]:
        """Set the context; raises ``InvalidRequest`` for metadata that cannot be a request id."""
        return self._around(context, request)

    @asynccontextmanager
    async def _around(self, context: Context, request: Any) -> AsyncIterator[None]:
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
        address = self._addresses.of_call(context)
        caller = replace(self._anonymous, address=address)
        CURRENT_CALL.set(CallContext(id, caller, trace))
        structlog.contextvars.bind_contextvars(request_id=id)
        if trace is not None:
            structlog.contextvars.bind_contextvars(trace_id=trace.trace_id)
        context.set_trailing_metadata(((REQUEST_ID_KEY, id),))
        if sent is not None and not _valid(sent):
            # Not ignored: the caller would not find the call, or the job, under this id.
            raise InvalidRequest([Violation(REQUEST_ID_KEY, f"metadata: {RULE}")])
        yield


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
