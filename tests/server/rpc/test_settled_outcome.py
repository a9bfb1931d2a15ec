"""A stream whose ``finished`` was sent has finished, whatever becomes of the call afterwards."""

import asyncio
import inspect
from contextlib import aclosing, nullcontext
from typing import Any

import grpc
import pytest
import structlog

from darkroom.v1 import generation_pb2, generation_pb2_grpc
from darkroom_server.rpc.interceptors.base import ContextInterceptor, Method
from tests.server.telemetry.scrape import counted
from tests.server.wire import Wire, serving

STREAMS = 3


class BusyMachine(ContextInterceptor):
    """Lets no handler continue after ``finished`` was sent, until the call ends.

    On a busy machine the client reads ``finished`` and ends the call before the server continues.
    """

    def around(self, method: Method, context: Any, request: Any) -> Any:
        return nullcontext()

    def _wrapped(self, behaviour: Any, method: Method) -> Any:
        if not inspect.isasyncgenfunction(behaviour):
            return behaviour

        async def stream(request: Any, context: Any) -> Any:
            async with aclosing(behaviour(request, context)) as responses:
                async for response in responses:
                    yield response
                    event = getattr(response, "event", None)
                    if event is not None and event.HasField("finished"):
                        await asyncio.Event().wait()

        return stream


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = grpc.aio.server

    def server(*, interceptors: Any, **options: Any) -> Any:
        return real(interceptors=[BusyMachine(), *interceptors], **options)

    monkeypatch.setattr(grpc.aio, "server", server)


def cancel_after(address: str, event: str, *, watch: bool = False) -> None:
    """Make a call of its own connection, and cancel it as soon as ``event`` is read."""
    with grpc.insecure_channel(address, (("grpc.use_local_subchannel_pool", 1),)) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        generation = generation_pb2.GenerateRequest(prompt="a star")
        call: Any
        if watch:
            submit = generation_pb2.SubmitGenerationRequest(generation=generation)
            id = stub.SubmitGeneration(submit).accepted.request_id
            call = stub.WatchGeneration(generation_pb2.WatchGenerationRequest(request_id=id))
        else:
            request = generation_pb2.GenerateStreamRequest(generation=generation)
            call = stub.GenerateStream(request)
        for response in call:
            if response.event.WhichOneof("event") == event:
                break
        call.cancel()


async def codes(wire: Wire, method: str) -> dict[str, float]:
    """The codes of all ``STREAMS`` calls of ``method``, once they have ended."""
    found: dict[str, float] = {}
    async with asyncio.timeout(60):
        while sum(found.values()) < STREAMS:
            handled = await counted(wire, "grpc_server_handled_total", "grpc_method", "grpc_code")
            found = {code: count for (name, code), count in handled.items() if name == method}
    return found


async def test_a_stream_cancelled_after_finished_has_finished(busy: None) -> None:
    with structlog.testing.capture_logs() as logs:
        async with serving(fake={"auto": True}) as wire:
            for _ in range(STREAMS):
                await asyncio.to_thread(cancel_after, wire.server.address, "finished")
            assert await codes(wire, "GenerateStream") == {"OK": STREAMS}
            images = await counted(wire, "darkroom_images_total", "outcome")
    assert images == {("finished",): STREAMS}
    outcomes = [line["outcome"] for line in logs if line["event"] == "request"]
    assert outcomes == ["finished"] * STREAMS


async def test_a_watch_cancelled_after_finished_is_ok(busy: None) -> None:
    async with serving(fake={"auto": True}) as wire:
        for _ in range(STREAMS):
            await asyncio.to_thread(cancel_after, wire.server.address, "finished", watch=True)
        assert await codes(wire, "WatchGeneration") == {"OK": STREAMS}


async def test_a_stream_cancelled_before_finished_is_cancelled(busy: None) -> None:
    async with serving() as wire:
        for _ in range(STREAMS):
            await asyncio.to_thread(cancel_after, wire.server.address, "accepted")
        assert await codes(wire, "GenerateStream") == {"CANCELLED": STREAMS}
        images = await counted(wire, "darkroom_images_total", "outcome")
    assert images == {("cancelled",): STREAMS}
