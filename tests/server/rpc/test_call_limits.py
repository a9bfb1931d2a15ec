"""The calls of one job are limited, so calls that never read cannot accumulate."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import grpc
import pytest

from darkroom.v1.types_pb2 import IMAGE_FORMAT_RAW_RGB
from darkroom_server.dispatch.admission import quotas as call_limits
from tests.server.streams import kind, read, rest, submit, watch
from tests.server.wire import refusal, serving


async def retry_while_exhausted(call: Callable[[], Any]) -> Any:
    """The answer of a call, retried until others end, which they do just after their last reply."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await call()
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise


async def test_one_job_has_a_call_limit_and_ended_calls_make_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(call_limits, "PER_JOB", 3)
    async with serving() as wire:
        calls: list[Any] = []
        for begin in (wire.stream, wire.stream, partial(watch, wire)):
            calls.append(begin(request_id="a"))
            await read(calls[-1])
        for rejected in (wire.generate(request_id="a"), rest(watch(wire, "a"))):
            error = await refusal(rejected)
            assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert error.info.reason == "QUOTA_EXCEEDED"
            assert error.trailers["grpc-retry-pushback-ms"] == "-1"
        wire.engine.advance(4)
        for call in calls:
            assert kind((await rest(call))[-1]) == "finished"
        for _ in range(4):
            assert (await retry_while_exhausted(lambda: wire.generate(request_id="a"))).images


async def test_an_unread_call_still_counts_after_its_job_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(call_limits, "PER_JOB", 2)
    large: dict[str, Any] = {"width": 1024, "height": 1024, "image_count": 4}
    async with serving(fake={"auto": True}) as wire:
        await submit(wire, request_id="a", format=IMAGE_FORMAT_RAW_RGB, **large)
        unread = [watch(wire, "a"), watch(wire, "a")]
        for call in unread:
            await read(call)
        error = await refusal(rest(watch(wire, "a")))
        assert error.info.reason == "QUOTA_EXCEEDED"
        unread.pop().cancel()
        assert kind((await retry_while_exhausted(lambda: rest(watch(wire, "a"))))[-1]) == "finished"
        assert kind((await rest(unread.pop()))[-1]) == "finished"
