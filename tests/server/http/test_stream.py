"""Streams of server-sent events: previews, results, errors, and who reads them."""

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from darkroom_server.core.errors import Failure, Reason
from darkroom_server.core.job import ImageFormat
from darkroom_server.dispatch import JobOutcome
from tests.server.http.door import Door, door, events_of

PARTIAL = "image_generation.partial_image"
COMPLETED = "image_generation.completed"


def streaming(there: Door, **fields: Any) -> "asyncio.Task[list[tuple[str, dict[str, Any]]]]":
    """The events of one request, once it has ended."""

    async def all_of_it() -> list[tuple[str, dict[str, Any]]]:
        reply = await there.generate(stream=True, **fields)
        assert reply.headers["content-type"].startswith("text/event-stream")
        return events_of(reply.text)

    return asyncio.create_task(all_of_it())


async def read(reply: httpx2.Response) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """The events of an open stream, each as soon as it is there."""
    text = ""
    async for chunk in reply.aiter_text():
        text += chunk
        *blocks, text = text.split("\n\n")
        for event in events_of("\n\n".join(blocks)):
            yield event


@pytest.mark.parametrize(
    ("asked", "steps", "expected"),
    [(0, 4, []), (1, 4, [2]), (2, 8, [4, 6]), (3, 7, [2, 4, 6]), (3, 3, [1, 2]), (9, 3, [1, 2])],
)
async def test_partial_images_are_previews_evenly_spaced(
    asked: int, steps: int, expected: list[int]
) -> None:
    partial = []
    async with door() as there:
        body = {"prompt": "a star", "stream": True, "progress": True, "seed": 4}
        body |= {"partial_images": asked, "steps": steps}
        async with there.client.stream("POST", "/v1/images/generations", json=body) as reply:
            events = read(reply)
            _, accepted = await anext(events)
            for step in range(1, steps + 1):
                there.wire.engine.advance()
                due = {"darkroom.progress"} | ({PARTIAL} if step in expected else set())
                while due:
                    name, data = await anext(events)
                    assert name in due or name == "darkroom.started"
                    due.discard(name)
                    if name == PARTIAL:
                        partial.append(data)
            (name, last), *_ = [event async for event in events]
        whole = there.wire.server.results.find("anybody", accepted["request_id"])
    assert [data["step"] for data in partial] == expected
    assert [data["partial_image_index"] for data in partial] == list(range(len(expected)))
    for data in partial:
        assert base64.b64decode(data["b64_json"])[:2] == b"\xff\xd8"
        assert data["output_format"] == "jpeg"
    assert name == COMPLETED
    assert base64.b64decode(last["b64_json"]) == whole.images[0].data
    assert last["usage"]["total_tokens"] == 16
    assert last["seed"] == 4


async def test_without_being_asked_only_openai_s_events_come() -> None:
    async with door(fake={"auto": True}) as there:
        events = await streaming(there, partial_images=3)
    assert {name for name, _ in events} == {PARTIAL, COMPLETED}


async def test_our_own_events_come_if_asked_for() -> None:
    async with door() as there:
        first = there.generating()
        await there.wire.submitted.get()
        events = streaming(there, progress=True, n=2, steps=3)
        await there.wire.submitted.get()
        there.wire.engine.advance(4)
        names = [name for name, _ in await events]
        await first
    assert names[0] == "darkroom.accepted"
    assert names[-1] == "darkroom.finished"
    assert {"darkroom.progress", "darkroom.started", COMPLETED} <= set(names)
    assert names.count(COMPLETED) == 2


async def test_webp_previews_and_urls() -> None:
    async with door(fake={"auto": True}) as there:
        events = await streaming(there, partial_images=1, output_format="webp", steps=4)
        job = await there.wire.submitted.get()
        assert job.preview_format is ImageFormat.WEBP
        assert dict(events)[PARTIAL]["output_format"] == "webp"
        events = await streaming(there, response_format="url")
        image = await there.client.get(dict(events)[COMPLETED]["url"])
        assert image.status_code == 200


async def test_an_error_before_the_job_is_a_status() -> None:
    async with door() as there:
        reply = await there.generate(stream=True, model="nonsense")
        assert reply.status_code == 404
        assert reply.headers["content-type"] == "application/json"


async def test_an_error_of_the_job_is_the_last_event() -> None:
    async with door() as there:
        events = streaming(there)
        job = await there.wire.submitted.get()
        there.wire.engine.fail(job.id, Failure(Reason.NON_FINITE, "not a number"))
        ((name, data),) = await events
    assert name == "error"
    assert data["error"]["code"] == "non_finite"


async def test_a_reader_that_disconnects_cancels() -> None:
    async with door() as there:
        events = streaming(there, progress=True)
        job = await there.wire.submitted.get()
        there.wire.engine.advance()
        events.cancel()
        assert await there.wire.cancelled.get() == job.id
        there.wire.engine.advance()
        await there.wire.counted(JobOutcome.CANCELLED)


async def test_a_silent_stream_sends_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darkroom_server.http.door.KEEP_ALIVE_SECONDS", 0.05)
    async with door() as there:
        body = {"prompt": "a star", "stream": True}
        async with there.client.stream("POST", "/v1/images/generations", json=body) as reply:
            chunks = reply.aiter_text()
            assert (await anext(chunks)).startswith(": waiting")
            there.wire.engine.advance(4)
            text = "".join([chunk async for chunk in chunks])
    assert [name for name, _ in events_of(text)] == [COMPLETED]
