from typing import Any

import grpc
import pytest
import structlog

from darkroom.v1 import generation_pb2, model_pb2
from darkroom_server.rpc.models import ModelService
from tests.server.wire import refusal, serving


async def test_what_nobody_foresaw_is_logged_and_not_told(monkeypatch: Any) -> None:
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


async def test_a_status_that_a_handler_chose_is_left_alone(monkeypatch: Any) -> None:
    async def abort(self: object, request: object, context: Any) -> None:
        await context.abort(grpc.StatusCode.DATA_LOSS, "chosen")

    monkeypatch.setattr(ModelService, "ListModels", abort)
    async with serving() as wire:
        with pytest.raises(grpc.aio.AioRpcError, match="chosen") as caught:
            await wire.models.ListModels(model_pb2.ListModelsRequest())
    assert caught.value.code() is grpc.StatusCode.DATA_LOSS


async def test_unknown_methods_are_unimplemented() -> None:
    async with serving() as wire:
        call: Any = wire.channel.unary_unary("/darkroom.v1.GenerationService/Nothing")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_request_of_more_than_16_mib_is_refused() -> None:
    async with serving(fake={"auto": True}) as wire:
        request = generation_pb2.GenerateRequest(prompt="a" * (16 * 1024**2))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await wire.generation.Generate(request)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
