"""Calls that wait for one job are bounded, so that those who never read cannot pile up."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import grpc
import pytest

from darkroom.v1.types_pb2 import IMAGE_FORMAT_RAW_RGB
from darkroom_server.dispatch.admission import quotas as call_limits
from tests.server.rpc.test_idempotency import submit, watch
from tests.server.rpc.test_stream import kind, read, rest
from tests.server.wire import refusal, serving


async def let_in(call: Callable[[], Any]) -> Any:
    """What a call answers once there is room for it: others end a moment after their last word."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await call()
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise


async def test_one_job_has_so_many_waiters_and_their_end_makes_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(call_limits, "PER_JOB", 3)
    async with serving() as wire:
        calls: list[Any] = []
        for begin in (wire.stream, wire.stream, partial(watch, wire)):
            calls.append(begin(request_id="a"))
            await read(calls[-1])
        for refused in (wire.generate(request_id="a"), rest(watch(wire, "a"))):
            error = await refusal(refused)
            assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert error.info.reason == "QUOTA_EXCEEDED"
            assert error.trailers["grpc-retry-pushback-ms"] == "-1"
        wire.engine.advance(4)
        for call in calls:
            assert kind((await rest(call))[-1]) == "finished"
        for _ in range(4):
            assert (await let_in(lambda: wire.generate(request_id="a"))).images


async def test_a_call_that_nobody_reads_stays_counted_though_its_job_has_ended(
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
        assert kind((await let_in(lambda: rest(watch(wire, "a"))))[-1]) == "finished"
        assert kind((await rest(unread.pop()))[-1]) == "finished"
