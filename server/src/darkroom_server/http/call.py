"""One HTTP request as the routes see it: its caller, ids, deadline and body."""

import re
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from starlette.datastructures import Headers
from starlette.responses import Response

from darkroom_server.core.caller import ANONYMOUS, Caller
from darkroom_server.core.errors import InvalidRequest, NotAllowed, Unauthenticated, Violation
from darkroom_server.dispatch import PeerAddresses
from darkroom_server.security.tokens import Tokens
from darkroom_server.service.call_context import REQUEST_ID, RULE, CallContext, new_request_id
from darkroom_server.service.generation import MAX_TIME_LIMIT_SECONDS
from darkroom_server.service.trace_context import new_trace, parse_traceparent

KEY_HEADER = "Idempotency-Key"
ID_HEADER = "X-Request-Id"
TIMEOUT_HEADER = "X-Request-Timeout"

ECHOED_ID = re.compile(r"[\x21-\x7e]{1,128}")
"""Ids of requests that are echoed and logged; proxies make them in many forms."""

SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request that may be answered.

    ``key``: the job's name, "" if the caller chose none. ``deadline`` in ``time.monotonic``
    seconds, None without one. ``base_url``: how the caller addresses the server. ``path``: the
    values in the path. ``violations`` are those of the headers. ``ending`` is closed when the
    answer was sent.
    """

    context: CallContext
    arrived: float
    deadline: float | None
    key: str
    base_url: str
    headers: Headers
    path: Mapping[str, str]
    query: Mapping[str, str]
    body: bytes = b""
    violations: tuple[Violation, ...] = ()
    ending: ExitStack = field(default_factory=ExitStack)


@dataclass(frozen=True, slots=True)
class Stream:
    """An answer of server-sent events: ``events`` are whole ones, as bytes."""

    events: AsyncGenerator[bytes]


Answer = Response | Stream


class Callers:
    """Finds who makes a request, under which id, in which trace.

    With ``tokens``, callers need one; without, each is ``anonymous`` with its own address of
    ``addresses``. With ``begin_traces``, a request without a trace begins one.
    """

    def __init__(
        self,
        tokens: Tokens | None = None,
        addresses: PeerAddresses | None = None,
        anonymous: Caller = ANONYMOUS,
        *,
        begin_traces: bool = False,
    ) -> None:
        self._tokens = tokens
        self._addresses = addresses or PeerAddresses()
        self._anonymous = anonymous
        self._begin_traces = begin_traces

    def context(self, headers: Headers, address: str) -> CallContext:
        """The context of a request from ``address``; the caller is not known yet."""
        key = headers.get(KEY_HEADER, "")
        traceparent = headers.get("traceparent")
        trace = parse_traceparent(traceparent) if traceparent else None
        if trace is None and self._begin_traces:
            trace = new_trace()
        caller = replace(self._anonymous, address=address)
        id = key if REQUEST_ID.fullmatch(key) else new_request_id()
        return CallContext(id, caller, trace, "http")

    def authenticate(self, context: CallContext, headers: Headers, *, admin: bool) -> CallContext:
        """``context`` with its caller; ``admin``: only an admin may call the route.

        Raises ``Unauthenticated`` or ``NotAllowed``.
        """
        caller = context.caller
        if self._tokens is not None:
            scheme, _, token = headers.get("authorization", "").partition(" ")
            caller = self._tokens.caller(token.strip() if scheme.lower() == "bearer" else None)
        if admin and not caller.admin:
            raise NotAllowed(f"this needs a token with admin = true, not that of {caller.name!r}")
        return replace(context, caller=caller)

    def address(self, peer: str, headers: Headers) -> str:
        """The address that the caller is counted as."""
        return self._addresses.address_of(peer, headers.getlist("x-forwarded-for"))

    def base_url(self, scheme: str, peer: str, headers: Headers) -> str:
        """How the caller addresses the server; a trusted proxy knows the scheme better."""
        forwarded = headers.get("x-forwarded-proto", "")
        if forwarded in ("http", "https") and self._addresses.trusts(peer):
            scheme = forwarded
        return f"{scheme}://{headers.get('host', '')}"


REJECTIONS = (Unauthenticated, NotAllowed)
"""What ``Callers.authenticate`` raises."""


def echoed_id(headers: Headers, context: CallContext) -> str:
    """The id of a request for its answer and the log: the caller's own if it can be logged."""
    sent = headers.get(ID_HEADER, "")
    return sent if ECHOED_ID.fullmatch(sent) else context.request_id


def key_of(headers: Headers) -> tuple[str, list[Violation]]:
    """The caller's name for the job, "" without one, and what is wrong with it."""
    key = headers.get(KEY_HEADER)
    if key is None:
        return "", []
    if not REQUEST_ID.fullmatch(key):
        return "", [Violation(KEY_HEADER, f"{RULE}, and not empty")]
    return key, []


def deadline_of(headers: Headers, arrived: float) -> tuple[float | None, list[Violation]]:
    """The deadline in ``time.monotonic`` seconds, None without one, and what is wrong with it."""
    text = headers.get(TIMEOUT_HEADER)
    if text is None:
        return None, []
    if not SECONDS.fullmatch(text) or not 0 < float(text) < MAX_TIME_LIMIT_SECONDS:
        rule = "must be a number of seconds, more than 0 and at most a year"
        return None, [Violation(TIMEOUT_HEADER, rule)]
    return arrived + float(text), []


def check_headers(call: Call) -> None:
    """Raise ``InvalidRequest`` if a header is invalid, for routes that check nothing else."""
    if call.violations:
        raise InvalidRequest(list(call.violations))


def now() -> float:
    """When a request arrives, in ``time.monotonic`` seconds."""
    return time.monotonic()
