"""A web service in front of Darkroom, through which deadlines and cancellation pass.

    pip install darkroom-client fastapi uvicorn
    uvicorn --app-dir examples fastapi_gateway:app

    curl -o star.png 'http://127.0.0.1:8000/image?prompt=a+large+yellow+star&seed=7'
    curl -N 'http://127.0.0.1:8000/events?prompt=a+large+yellow+star'

The header ``X-Timeout`` (seconds) is the deadline. A caller that hangs up cancels its generation,
and the device is free after one more step.
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
}
"""What is not here is 502: a fault behind this service, not one of its caller."""

HUNG_UP = 499

T = TypeVar("T")
Timeout = Annotated[float, Header(alias="X-Timeout", gt=0, le=600)]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """One client for all requests; its server is in DARKROOM_TARGET."""
    async with AsyncClient() as client:
        app.state.client = client
        yield


app = FastAPI(title="Darkroom gateway", lifespan=lifespan)


@app.get("/image")
async def image(
    request: Request, prompt: str, seed: int | None = None, x_timeout: Timeout = 60.0
) -> Response:
    """Draw one PNG."""
    client: AsyncClient = request.app.state.client
    drawing = client.generate(prompt, seed=seed, format="png", timeout=x_timeout)
    result = await unless_hung_up(request, drawing)
    if result is None:
        return Response(status_code=HUNG_UP)
    drawn = result.images[0]
    headers = {"X-Request-Id": result.request_id, "X-Seed": str(drawn.seed)}
    return Response(drawn.data, media_type="image/png", headers=headers)


@app.get("/events")
async def events(
    request: Request, prompt: str, seed: int | None = None, x_timeout: Timeout = 60.0
) -> Response:
    """Draw one PNG, and tell about it as server-sent events."""
    client: AsyncClient = request.app.state.client
    async with AsyncExitStack() as stack:
        drawing = client.stream(prompt, seed=seed, format="png", timeout=x_timeout)
        stream = await stack.enter_async_context(drawing)
        # The first event before the headers, so that a refusal has its own status.
        first = await unless_hung_up(request, anext(stream))
        if first is None:
            return Response(status_code=HUNG_UP)
        stack.pop_all()  # From here on the answer leaves the stream.
        return EventsResponse(request, stream, first)


@app.exception_handler(DarkroomError)
async def explain(request: Request, error: DarkroomError) -> Response:
    """An error of Darkroom as one of HTTP."""
    seconds = error.retry_after
    return JSONResponse(
        described(error),
        status_code=STATUS.get(type(error), 502),
        headers={"Retry-After": str(max(1, round(seconds)))} if seconds is not None else None,
    )


class EventsResponse(StreamingResponse):
    """The stream as server-sent events. It is left with the answer, which cancels what is undone.

    The caller may be gone before the first byte is sent, and then nobody iterates over the body.
    """

    def __init__(self, request: Request, stream: AsyncStream, first: Event) -> None:
        super().__init__(told(stream, first), media_type="text/event-stream")
        self._request = request
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, until all is told or the caller has hung up."""
        async with self._stream:
            await unless_hung_up(self._request, super().__call__(scope, receive, send))


async def told(stream: AsyncStream, first: Event) -> AsyncIterator[str]:
    """Each event on the wire."""
    yield sent(first)
    try:
        async for event in stream:
            yield sent(event)
    except DarkroomError as error:
        # The headers are out: the error is the last event.
        yield f"event: error\ndata: {json.dumps(described(error))}\n\n"


def sent(event: Event) -> str:
    """One event on the wire."""
    data: dict[str, object] = {}
    match event:
        case Accepted(request_id=request_id, queue_position=position):
            data = {"request_id": request_id, "queue_position": position}
        case Progress(step=step, steps=steps):
            data = {"step": step, "steps": steps}
        case ImageReady(image=drawn):
            data = {"seed": drawn.seed, "png": base64.b64encode(drawn.data).decode()}
    return f"event: {type(event).__name__.lower()}\ndata: {json.dumps(data)}\n\n"


def described(error: DarkroomError) -> dict[str, object]:
    """What the caller is told."""
    return {
        "error": type(error).__name__,
        "message": str(error),
        "request_id": error.request_id,
        "violations": {each.field: each.description for each in error.violations},
    }


async def unless_hung_up(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of ``work``, or None: it is cancelled when the caller hangs up."""
    working = asyncio.ensure_future(work)
    waiting = asyncio.ensure_future(hung_up(request))
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, waiting):
            task.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)


async def hung_up(request: Request) -> None:
    """Return when the caller is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
