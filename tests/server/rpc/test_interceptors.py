import asyncio
from typing import Any

import grpc
import pytest
import structlog

from darkroom.v1 import generation_pb2, model_pb2
from darkroom_server.core.errors import UnknownRequest
from darkroom_server.rpc.generation import GenerationServicer
from darkroom_server.rpc.interceptors.base import Method
from darkroom_server.rpc.interceptors.errors import Errors
from darkroom_server.rpc.models import ModelServicer
from darkroom_server.service.trace_context import parse_traceparent
from tests.server.wire import refusal, serving

ListModels = model_pb2.ListModelsRequest


async def test_an_unexpected_error_is_logged_and_not_sent(monkeypatch: Any) -> None:
    async with serving(fake={"auto": True}) as wire:

        def fail(_: object) -> None:
            raise ValueError("a secret path")

        monkeypatch.setattr(wire.server.dispatcher, "submit", fail)
        with structlog.testing.capture_logs(
            processors=[structlog.contextvars.merge_contextvars]
        ) as logs:
            error = await refusal(wire.generate(request_id="mine"))
    assert error.code is grpc.StatusCode.INTERNAL
    assert error.message == "internal error"
    assert error.info.reason == "INTERNAL"
    assert "secret" not in str(error.status)
    (entry,) = [line for line in logs if line["event"] == "handler failed"]
    assert entry["request_id"] == "mine"
    assert entry["exc_info"]


async def test_an_unexpected_error_of_a_stream_is_not_sent(monkeypatch: Any) -> None:
    async def fail(self: object, request: object, context: object) -> Any:
        yield generation_pb2.GenerateStreamResponse()
        raise ValueError("a secret path")

    monkeypatch.setattr(GenerationServicer, "GenerateStream", fail)
    async with serving() as wire:
        call = wire.stream()
        await call.read()
        error = await refusal(call.read())
    assert error.code is grpc.StatusCode.INTERNAL
    assert error.message == "internal error"
    assert error.trailers["darkroom-request-id"]
    assert "secret" not in str(error.status)


async def test_a_status_set_by_a_handler_is_kept(monkeypatch: Any) -> None:
    async def abort(self: object, request: object, context: Any) -> None:
        await context.abort(grpc.StatusCode.DATA_LOSS, "chosen")

    monkeypatch.setattr(ModelServicer, "ListModels", abort)
    async with serving() as wire:
        with pytest.raises(grpc.aio.AioRpcError, match="chosen") as caught:
            await wire.models.ListModels(model_pb2.ListModelsRequest())
    assert caught.value.code() is grpc.StatusCode.DATA_LOSS


async def test_an_error_for_a_disconnected_caller_is_not_logged() -> None:
    class Gone:
        def trailing_metadata(self) -> tuple[()]:
            return ()

        async def abort_with_status(self, status: Any) -> None:
            raise grpc.aio.InternalError("the caller has disconnected")

    method = Method("darkroom.v1.GenerationService", "Generate", "unary")
    context: Any = Gone()
    with structlog.testing.capture_logs() as logs, pytest.raises(asyncio.CancelledError):
        async with Errors().around(method, context, None):
            raise UnknownRequest("star")
    assert logs == []


async def test_unknown_methods_are_unimplemented() -> None:
    async with serving() as wire:
        call: Any = wire.channel.unary_unary("/darkroom.v1.GenerationService/Nothing")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("message", [b"\xff\xff\xff", b"\x0a\x02\xff\xfe"], ids=["garbage", "text"])
@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("darkroom.v1.GenerationService/Generate", "unary_unary"),
        ("darkroom.v1.GenerationService/GenerateStream", "unary_stream"),
        ("grpc.health.v1.Health/Check", "unary_unary"),
        ("grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", "stream_stream"),
    ],
)
async def test_an_undecodable_message_is_an_invalid_argument(
    message: bytes, method: str, kind: str
) -> None:
    async with serving(fake={"auto": True}) as wire:
        call: Any = getattr(wire.channel, kind)(f"/{method}")
        sent: Any = iter([message]) if kind.startswith("stream") else message
        begun = call(sent)
        error = await refusal(begun if kind == "unary_unary" else begun.read())
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.info.reason == "INVALID_REQUEST"
    assert set(error.violations) == {"request"}
    assert "Decode" not in str(error.status)


async def test_too_much_metadata_is_rejected() -> None:
    async with serving(fake={"auto": True}) as wire:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await wire.models.ListModels(ListModels(), metadata=(("x-much", "a" * 20_000),))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await wire.generate()).images


async def test_a_request_of_more_than_1_mib_is_rejected() -> None:
    async with serving(fake={"auto": True}) as wire:
        request = generation_pb2.GenerateRequest(prompt="a" * 1024**2)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await wire.generation.Generate(request)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def trailing_id(call: Any) -> str:
    trailers = dict(list(await call.trailing_metadata()))
    id: str = trailers["darkroom-request-id"]
    return id


async def test_every_reply_names_its_call() -> None:
    async with serving(fake={"auto": True}) as wire:
        request = generation_pb2.GenerateRequest(prompt="a star", request_id="mine")
        call = wire.generation.Generate(request)
        assert (await call).request_id == await trailing_id(call) == "mine"
        call = wire.generation.Generate(generation_pb2.GenerateRequest(prompt="a star"))
        assert (await call).request_id == await trailing_id(call)
        ids = [await trailing_id(wire.models.ListModels(ListModels())) for _ in range(2)]
        assert len({*ids}) == 2
        assert all(len(id) == 32 for id in ids)
        error = await refusal(wire.generate(width=1, request_id="wrong"))
        assert error.trailers["darkroom-request-id"] == "wrong"
        error = await refusal(wire.generate(request_id="not an id"))
        assert len(error.trailers["darkroom-request-id"]) == 32
        assert set(error.violations) == {"request_id"}


async def test_an_id_in_the_metadata_names_call_and_job() -> None:
    metadata = (("darkroom-request-id", "theirs"),)
    async with serving(fake={"auto": True}) as wire:
        call = wire.generation.Generate(
            generation_pb2.GenerateRequest(prompt="a star"), metadata=metadata
        )
        assert (await call).request_id == await trailing_id(call) == "theirs"
        assert (await wire.submitted.get()).id.startswith("theirs")
        request = generation_pb2.GenerateRequest(prompt="a star", request_id="mine")
        call = wire.generation.Generate(request, metadata=metadata)
        assert (await call).request_id == await trailing_id(call) == "mine"
        assert await trailing_id(wire.models.ListModels(ListModels(), metadata=metadata)) == (
            "theirs"
        )


async def test_the_first_of_two_ids_in_the_metadata_counts() -> None:
    metadata = (("darkroom-request-id", "first"), ("darkroom-request-id", "second"))
    async with serving() as wire:
        call = wire.models.ListModels(ListModels(), metadata=metadata)
        assert await trailing_id(call) == "first"


async def test_metadata_that_cannot_be_an_id_is_rejected() -> None:
    async with serving() as wire:
        wrong = (("darkroom-request-id", "a b"),)
        error = await refusal(wire.models.ListModels(ListModels(), metadata=wrong))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert set(error.violations) == {"darkroom-request-id"}
    assert len(error.trailers["darkroom-request-id"]) == 32


TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


async def test_the_log_names_the_trace(monkeypatch: Any) -> None:
    async def fail(self: object, request: object, context: Any) -> None:
        raise ValueError("for the log")

    monkeypatch.setattr(ModelServicer, "ListModels", fail)
    merge = [structlog.contextvars.merge_contextvars]
    with structlog.testing.capture_logs(processors=merge) as logs:
        async with serving() as wire:
            for sent in (f"00-{TRACE}-00f067aa0ba902b7-01", "nonsense"):
                metadata = (("traceparent", sent),)
                await refusal(wire.models.ListModels(ListModels(), metadata=metadata))
    first, second = [line for line in logs if line["event"] == "handler failed"]
    assert first["trace_id"] == TRACE
    assert "trace_id" not in second


@pytest.mark.parametrize(
    ("traceparent", "trace_id"),
    [
        (f"00-{TRACE}-00f067aa0ba902b7-01", TRACE),
        (f"01-{TRACE}-00f067aa0ba902b7-01-more", TRACE),
        (f"00-{TRACE}-00f067aa0ba902b7-01-more", None),
        (f"ff-{TRACE}-00f067aa0ba902b7-01", None),
        (f"00-{TRACE.upper()}-00f067aa0ba902b7-01", None),
        (f"00-{'0' * 32}-00f067aa0ba902b7-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE}-00f067aa0ba902b7", None),
        ("", None),
    ],
)
def test_traceparents(traceparent: str, trace_id: str | None) -> None:
    trace = parse_traceparent(traceparent)
    assert (trace.trace_id if trace else None) == trace_id
