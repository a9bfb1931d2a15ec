"""The web service: what passes through it, in both directions."""

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

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
def test_refusals_have_their_status(
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


def test_a_failure_on_the_way_is_the_last_event(
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
async def test_hanging_up_cancels(
    darkroom_server: FakeServer, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setenv("DARKROOM_TARGET", darkroom_server.target)
    darkroom_server.script(Behaviour(hold=threading.Event()))
    gone = asyncio.Event()
    sent: list[dict[str, Any]] = []
    messages = iter([{"type": "http.request", "body": b"", "more_body": False}])

    async def receive() -> dict[str, Any]:
        if (message := next(messages, None)) is not None:
            return message
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
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
        gone.set()
        await request
        job = darkroom_server.jobs[0]
        await asyncio.to_thread(darkroom_server.wait_for, lambda: job.state is JobState.CANCELLED)

    assert job.steps_done == 0
