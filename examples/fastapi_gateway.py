"""A web service in front of Darkroom that passes on deadlines and cancellation.

In a checkout:

    pip install ./protos ./client fastapi uvicorn
    uvicorn --app-dir examples fastapi_gateway:app

    curl -o star.png 'http://127.0.0.1:8000/image?prompt=a+large+yellow+star&seed=7'
    curl -N 'http://127.0.0.1:8000/events?prompt=a+large+yellow+star'

The header ``X-Timeout`` (seconds) is the deadline. If a caller disconnects, its generation is
cancelled, and the device is free after one more step.
"""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Header, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

import darkroom_client
from darkroom_client import (
    Accepted,
    AsyncClient,
    AsyncStream,
    DarkroomError,
    Event,
    ImageReady,
    Progress,
)

STATUS: dict[type[DarkroomError], int] = {
    darkroom_client.InvalidRequest: 422,
    darkroom_client.ModelNotFound: 404,
    darkroom_client.TooLarge: 413,
    darkroom_client.ReplyTooLarge: 413,
    darkroom_client.QuotaExceeded: 429,
    darkroom_client.Overloaded: 503,
    darkroom_client.Unavailable: 503,
    darkroom_client.DeadlineExceeded: 504,
    darkroom_client.DeadlineUnreachable: 504,
}
"""Any other error is 502: a fault behind this service, not the caller's."""

CLIENT_CLOSED_REQUEST = 499
"""The caller disconnected; nginx uses the same number in its logs."""

T = TypeVar("T")
Timeout = Annotated[float, Header(alias="X-Timeout", gt=0, le=600)]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open one client for all requests; DARKROOM_TARGET is its server."""
    async with AsyncClient() as client:
        app.state.client = client
        yield


app = FastAPI(title="Darkroom gateway", lifespan=lifespan)


@app.get("/image")
async def image(
    request: Request, prompt: str, seed: int | None = None, x_timeout: Timeout = 60.0
) -> Response:
    """Generate one PNG."""
    client: AsyncClient = request.app.state.client
    call = client.generate(prompt, seed=seed, format="png", timeout=x_timeout)
    result = await unless_disconnected(request, call)
    if result is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    generated = result.images[0]
    headers = {"X-Request-Id": result.request_id, "X-Seed": str(generated.seed)}
    return Response(generated.data, media_type="image/png", headers=headers)


@app.get("/events")
async def events(
    request: Request, prompt: str, seed: int | None = None, x_timeout: Timeout = 60.0
) -> Response:
    """Generate one PNG and stream its events as server-sent events."""
    client: AsyncClient = request.app.state.client
    async with AsyncExitStack() as stack:
        opened = client.stream(prompt, seed=seed, format="png", timeout=x_timeout)
        stream = await stack.enter_async_context(opened)
        # Wait for the first event before the headers: a rejection then gets its own HTTP status.
        first = await unless_disconnected(request, anext(stream))
        if first is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        stack.pop_all()  # From here on, the response closes the stream.
        return EventsResponse(request, stream, first)


@app.exception_handler(DarkroomError)
async def explain(request: Request, error: DarkroomError) -> Response:
    """Return an error of Darkroom as an HTTP response."""
    seconds = error.retry_after
    return JSONResponse(
        described(error),
        status_code=STATUS.get(type(error), 502),
        headers={"Retry-After": str(max(1, round(seconds)))} if seconds is not None else None,
    )


class EventsResponse(StreamingResponse):
    """The stream as server-sent events; when the response ends, so does the stream.

    Closing the stream cancels an unfinished generation. It is closed here and not in the body's
    iterator, because nothing iterates over the body if the caller disconnects before the first
    byte.
    """

    def __init__(self, request: Request, stream: AsyncStream, first: Event) -> None:
        super().__init__(sse_messages(stream, first), media_type="text/event-stream")
        self._request = request
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the last one, or until the caller disconnects."""
        async with self._stream:
            await unless_disconnected(self._request, super().__call__(scope, receive, send))


async def sse_messages(stream: AsyncStream, first: Event) -> AsyncIterator[str]:
    """Yield each event as a server-sent event."""
    yield sse_message(first)
    try:
        async for event in stream:
            yield sse_message(event)
    except DarkroomError as error:
        # The headers were already sent, so the error is the last event.
        yield f"event: error\ndata: {json.dumps(described(error))}\n\n"


def sse_message(event: Event) -> str:
    """Return one event as a server-sent event."""
    data: dict[str, object] = {}
    match event:
        case Accepted(request_id=request_id, queue_position=position):
            data = {"request_id": request_id, "queue_position": position}
        case Progress(step=step, steps=steps):
            data = {"step": step, "steps": steps}
        case ImageReady(image=ready):
            data = {"seed": ready.seed, "png": base64.b64encode(ready.data).decode()}
    return f"event: {type(event).__name__.lower()}\ndata: {json.dumps(data)}\n\n"


def described(error: DarkroomError) -> dict[str, object]:
    """Return the JSON fields of an error."""
    return {
        "error": type(error).__name__,
        "message": str(error),
        "request_id": error.request_id,
        "violations": {each.field: each.description for each in error.violations},
    }


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """Return the result of ``work``; if the caller disconnects first, cancel it and return None."""
    working = asyncio.ensure_future(work)
    waiting = asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, waiting):
            task.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)


async def disconnected(request: Request) -> None:
    """Return when the caller disconnects."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
