"""The FastAPI gateway: requests, errors, deadlines and cancellation pass through it."""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from fastapi.testclient import TestClient
from starlette.requests import ClientDisconnect

from darkroom_client import GenerationFailed, InvalidRequest, Overloaded, Violation
from darkroom_client.testing import Behaviour, FakeServer, JobState
from examples.fastapi_gateway import app


@pytest.fixture
def web(darkroom_server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setenv("DARKROOM_TARGET", darkroom_server.target)
    with TestClient(app) as web:
        yield web


def test_an_image(web: TestClient, darkroom_server: FakeServer) -> None:
    answer = web.get("/image", params={"prompt": "a star", "seed": 7})

    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    assert answer.content.startswith(b"\x89PNG")
    assert answer.headers["X-Seed"] == "7"
    assert answer.headers["X-Request-Id"] == darkroom_server.requests[0].request_id


def test_events(web: TestClient) -> None:
    answer = web.get("/events", params={"prompt": "a star"})

    names = [line for line in answer.text.splitlines() if line.startswith("event: ")]
    assert names[0] == "event: accepted"
    assert names.count("event: progress") == 4
    assert names[-2:] == ["event: imageready", "event: finished"]


@pytest.mark.parametrize("path", ["/image", "/events"])
def test_errors_map_to_http_statuses(
    web: TestClient, darkroom_server: FakeServer, path: str
) -> None:
    violation = Violation(field="prompt", description="is too long")
    darkroom_server.script(
        Behaviour(error=InvalidRequest("no", violations=(violation,))),
        Behaviour(error=Overloaded("the queue is full", retry_after=3.0)),
    )

    answer = web.get(path, params={"prompt": "a star"})
    assert answer.status_code == 422
    assert answer.json()["violations"] == {"prompt": "is too long"}

    answer = web.get(path, params={"prompt": "a star"})
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "3")


def test_a_failure_during_the_stream_is_the_last_event(
    web: TestClient, darkroom_server: FakeServer
) -> None:
    darkroom_server.script(Behaviour(error=GenerationFailed("black"), error_at_step=2))

    answer = web.get("/events", params={"prompt": "a star"})

    *_, event, data = [line for line in answer.text.splitlines() if line]
    assert event == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"] == "GenerationFailed"


def test_the_deadline_passes_through(web: TestClient, darkroom_server: FakeServer) -> None:
    darkroom_server.script(default=Behaviour(hold=threading.Event()))

    answer = web.get("/image", params={"prompt": "a star"}, headers={"X-Timeout": "0.2"})

    assert answer.status_code == 504
    ended = (JobState.EXPIRED, JobState.CANCELLED)
    darkroom_server.wait_for(lambda: darkroom_server.jobs[0].state in ended)


@pytest.mark.parametrize("path", ["/image", "/events"])
async def test_a_disconnect_on_a_real_connection_cancels(
    darkroom_server: FakeServer, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setenv("DARKROOM_TARGET", darkroom_server.target)
    darkroom_server.script(Behaviour(hold=threading.Event()))
    with socket.create_server(("127.0.0.1", 0)) as port:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        serving = asyncio.ensure_future(server.serve([port]))
        reader, writer = await asyncio.open_connection(*port.getsockname())
        writer.write(f"GET {path}?prompt=star HTTP/1.1\r\nHost: web\r\n\r\n".encode())
        await asyncio.to_thread(darkroom_server.wait_for, lambda: len(darkroom_server.jobs) == 1)
        job = darkroom_server.jobs[0]
        if path == "/events":
            await reader.readuntil(b"event: accepted")
        # No event is pending that could fail to be sent; the disconnect is detected anyway.
        writer.transport.abort()
        await asyncio.to_thread(darkroom_server.wait_for, lambda: job.state is JobState.CANCELLED)
        server.should_exit = True
        await serving

    assert job.steps_done == 0


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
@pytest.mark.parametrize("path", ["/image", "/events"])
async def test_a_disconnect_cancels(
    darkroom_server: FakeServer,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    spec_version: str,
    early: bool,
) -> None:
    """``early``: before any byte of the answer is sent."""
    monkeypatch.setenv("DARKROOM_TARGET", darkroom_server.target)
    darkroom_server.script(Behaviour(hold=threading.Event()))
    begun, gone = asyncio.Event(), asyncio.Event()
    messages = iter([{"type": "http.request", "body": b"", "more_body": False}])

    async def receive() -> dict[str, Any]:
        if (message := next(messages, None)) is not None:
            return message
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        begun.set()
        if early:
            gone.set()
        if gone.is_set():
            raise OSError("the caller is gone")

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": spec_version},
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"prompt=star",
        "headers": [],
        "app": app,
    }
    async with app.router.lifespan_context(app):
        request = asyncio.ensure_future(app(scope, receive, send))
        await asyncio.to_thread(darkroom_server.wait_for, lambda: len(darkroom_server.jobs) == 1)
        if path == "/events":
            await begun.wait()
        gone.set()
        # This error is the server's own, and it handles it.
        with contextlib.suppress(OSError, ClientDisconnect):
            await request
        job = darkroom_server.jobs[0]
        await asyncio.to_thread(darkroom_server.wait_for, lambda: job.state is JobState.CANCELLED)

    assert job.steps_done == 0
