"""Handles one HTTP request: rules, caller, body, route, answer."""

import asyncio
import json
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import structlog
from starlette.datastructures import Headers, QueryParams
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from darkroom_server.core.errors import DarkroomError, Reason
from darkroom_server.http.body import BodyReader
from darkroom_server.http.browser import BrowserRules
from darkroom_server.http.call import (
    REJECTIONS,
    Answer,
    Call,
    Callers,
    Stream,
    deadline_of,
    echoed_id,
    key_of,
)
from darkroom_server.http.errors import (
    DISCONNECTED,
    ErrorAnswer,
    HttpError,
    error_answer,
    internal_error,
)
from darkroom_server.http.messages.event_stream import error_event
from darkroom_server.http.routing import UNKNOWN_PATH, Access, Route, find_route
from darkroom_server.service.call_context import CURRENT_CALL

log = structlog.get_logger(__name__)

CHUNK_BYTES = 64 * 1024
"""Of a large answer, which is written as the caller reads it."""

KEEP_ALIVE_SECONDS = 15.0
"""A stream without events sends a comment this often, so that proxies keep it open."""

KEEP_ALIVE = b": waiting\n\n"

EVERY_ANSWER = {
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class HttpObserver(Protocol):
    """Records requests, on the event loop, without blocking and without raising."""

    def request_started(self) -> None:
        """A request begins."""

    def request_ended(self, method: str, route: str, status: int, seconds: float) -> None:
        """It ended; ``route`` is a path of the server's own, or "unknown"."""

    def body_sent(self, route: str, size: int) -> None:
        """An answer had ``size`` bytes of body."""


class RejectionObserver(Protocol):
    """Receives each request with an invalid token, on the event loop."""

    def call_rejected(self, reason: Reason) -> None:
        """Record it, without blocking and without raising."""


@dataclass(slots=True)
class _Sent:
    """What was sent so far; ``status`` is 0 before the headers."""

    send: Send
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 0
    size: int = 0
    complete: bool = False

    async def begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        own = {name for name, _ in headers}
        added = [(k.encode(), v.encode("latin-1")) for k, v in self.headers.items()]
        headers = [*headers, *(each for each in added if each[0] not in own)]
        self.status = status
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, data: bytes, *, more: bool) -> None:
        self.size += len(data)
        self.complete = not more
        await self.send({"type": "http.response.body", "body": data, "more_body": more})


class HttpDoor:
    """An ASGI application; converts requests for the service layer and answers them."""

    def __init__(
        self,
        routes: list[Route],
        callers: Callers,
        rules: BrowserRules,
        observer: HttpObserver,
        rejections: RejectionObserver,
    ) -> None:
        self._routes = routes
        self._callers = callers
        self._rules = rules
        self._observer = observer
        self._rejections = rejections
        self._bodies = BodyReader()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; never raises, except when the server cancels it."""
        began = time.monotonic()
        sent = _Sent(send)
        self._observer.request_started()
        label = UNKNOWN_PATH
        try:
            headers = Headers(scope=scope)
            sent.headers = {**EVERY_ANSWER, **self._rules.cors_headers(headers.get("origin"))}
            route, path = find_route(self._routes, scope["path"])
            label = route.path if route is not None else label
            await self._respond(scope, receive, sent, headers, route, path)
        except ConnectionError:
            pass  # The caller has disconnected.
        finally:
            seconds = time.monotonic() - began
            status = sent.status if sent.complete else DISCONNECTED
            if status == DISCONNECTED:
                log.info("caller disconnected", route=label, status=status, seconds=seconds)
            structlog.contextvars.clear_contextvars()
            self._observer.request_ended(scope["method"], label, status, seconds)
            self._observer.body_sent(label, sent.size)

    async def _respond(
        self,
        scope: Scope,
        receive: Receive,
        sent: _Sent,
        headers: Headers,
        route: Route | None,
        path: dict[str, str],
    ) -> None:
        peer = (scope.get("client") or ("", 0))[0]
        context = self._callers.context(headers, self._callers.address(peer, headers))
        sent.headers["x-request-id"] = echoed_id(headers, context)
        structlog.contextvars.bind_contextvars(
            request_id=context.request_id, http_request_id=sent.headers["x-request-id"]
        )
        if context.trace is not None:
            structlog.contextvars.bind_contextvars(trace_id=context.trace.trace_id)
        try:
            self._rules.check(headers)
            _check_framing(headers)
            if scope["method"] == "OPTIONS":
                await _send_preflight(sent, self._rules.preflight_headers(headers.get("origin")))
                return
            route = _checked_route(route, scope["method"])
            if route.access is not Access.OPEN:
                admin = route.access is Access.ADMIN
                context = self._callers.authenticate(context, headers, admin=admin)
                structlog.contextvars.bind_contextvars(caller=context.caller.name)
            key, wrong_key = key_of(headers)
            arrived = time.monotonic()
            deadline, wrong_deadline = deadline_of(headers, arrived)
            call = Call(
                context=context,
                arrived=arrived,
                deadline=deadline,
                key=key,
                base_url=self._callers.base_url(scope["scheme"], peer, headers),
                headers=headers,
                path=path,
                query=QueryParams(scope["query_string"]),
                violations=(*wrong_key, *wrong_deadline),
            )
            if route.method == "POST":
                body = await self._bodies.read(receive, headers, context.caller, route.max_body)
                call = replace(call, body=body)
        except (DarkroomError, HttpError) as error:
            if isinstance(error, REJECTIONS):
                self._rejections.call_rejected(error.reason)
            await _send_error(sent, error_answer(error))
        else:
            sent.headers["darkroom-request-id"] = context.request_id
            CURRENT_CALL.set(context)
            with call.ending:
                await _unless_disconnected(receive, _answer(route, call, sent))


async def _answer(route: Route, call: Call, sent: _Sent) -> None:
    """Run the route's handler and send what it returns or raises."""
    try:
        answer = await route.handler(call)
    except (DarkroomError, HttpError) as error:
        await _send_error(sent, error_answer(error))
    except Exception:
        log.exception("handler failed", route=route.path)
        await _send_error(sent, internal_error())
    else:
        await _send_answer(sent, answer)


async def _send_answer(sent: _Sent, answer: Answer) -> None:
    if isinstance(answer, Stream):
        await _send_stream(sent, answer)
        return
    await sent.begin(answer.status_code, answer.raw_headers)
    body = bytes(answer.body)
    for offset in range(0, max(len(body), 1), CHUNK_BYTES):
        chunk = body[offset : offset + CHUNK_BYTES]
        await sent.write(chunk, more=offset + CHUNK_BYTES < len(body))


async def _send_stream(sent: _Sent, stream: Stream) -> None:
    events = stream.events
    pending: asyncio.Future[bytes | None] | None = None
    try:
        await sent.begin(200, [(b"content-type", b"text/event-stream; charset=utf-8")])
        while True:
            pending = pending or asyncio.ensure_future(_next(events))
            done, _ = await asyncio.wait({pending}, timeout=KEEP_ALIVE_SECONDS)
            if not done:
                await sent.write(KEEP_ALIVE, more=True)
                continue
            finished, pending = pending, None
            if (error := finished.exception()) is not None:
                await sent.write(error_event(error), more=False)
                return
            event = finished.result()
            if event is None:
                await sent.write(b"", more=False)
                return
            for offset in range(0, len(event), CHUNK_BYTES):
                await sent.write(event[offset : offset + CHUNK_BYTES], more=True)
    finally:
        if pending is not None:
            pending.cancel()
            await asyncio.wait({pending})
        await events.aclose()


async def _next(events: Any) -> bytes | None:
    event: bytes | None = await anext(events, None)
    return event


async def _send_error(sent: _Sent, answer: ErrorAnswer) -> None:
    headers = {"content-type": "application/json", **answer.headers}
    response = Response(json.dumps(answer.body), answer.status, headers)
    await _send_answer(sent, response)


async def _send_preflight(sent: _Sent, headers: dict[str, str]) -> None:
    await _send_answer(sent, Response(None, 204, headers))


async def _unless_disconnected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run ``work``, and cancel it if the caller disconnects."""
    handler = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({handler, disconnect}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        disconnect.cancel()
        handler.cancel()
        await asyncio.wait({handler, disconnect})
    if not handler.cancelled():
        handler.result()


async def _disconnected(receive: Receive) -> None:
    message: Message = {"type": "http.request"}
    while message["type"] != "http.disconnect":
        message = await receive()


def _checked_route(route: Route | None, method: str) -> Route:
    if route is None:
        raise HttpError(404, "unknown_path", "there is no such path; see /openapi.json")
    if method != route.method and not (method == "HEAD" and route.method == "GET"):
        message = f"{route.path} takes {route.method}, not {method[:32]}"
        raise HttpError(405, "wrong_method", message, {"allow": route.method})
    return route


def _check_framing(headers: Headers) -> None:
    """Reject requests whose end a proxy may see elsewhere (request smuggling)."""
    if "transfer-encoding" in headers and "content-length" in headers:
        message = "a request has Transfer-Encoding or Content-Length, not both"
        raise HttpError(400, "ambiguous_length", message, {"connection": "close"})
