import asyncio
import io
from typing import Any

import grpc
import pytest
from PIL import Image

from darkroom.v1 import generation_pb2, types_pb2
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.errors import Failure, Reason
from darkroom_server.core.model import OPTIONAL_FIELDS
from darkroom_server.dispatch import JobOutcome
from darkroom_server.settings import Dispatch, Engine
from tests.server.wire import refusal, serving

AUTO = {"auto": True}


async def test_only_the_prompt_is_required() -> None:
    async with serving(fake=AUTO) as wire:
        response = await wire.generate("a star")
    (image,) = response.images
    assert Image.open(io.BytesIO(image.data)).size == (64, 64)
    assert image.format == types_pb2.IMAGE_FORMAT_PNG
    assert (response.model, response.model_revision) == ("demo", "fake")
    assert len(response.request_id) == 32
    assert response.timings.total.ToNanoseconds() > 0


async def test_every_field_reaches_the_job_and_the_replay_record() -> None:
    fields: dict[str, Any] = {
        "model": "demo",
        "prompt": "a star ★",
        "negative_prompt": "a moon",
        "width": 72,
        "height": 80,
        "steps": 3,
        "guidance_scale": 7.3,
        "seed": 0,
        "image_count": 2,
        "scheduler": types_pb2.SCHEDULER_EULER,
        "format": types_pb2.IMAGE_FORMAT_JPEG,
        "quality": 55,
        "exact": True,
        "request_id": "my.request-1_A",
    }
    async with serving(fake=AUTO) as wire:
        response = await wire.generate(**fields)
        job = await wire.submitted.get()
    assert job.id == "my.request-1_A"
    assert (job.prompt, job.negative_prompt) == ("a star ★", "a moon")
    assert (job.width, job.height, job.steps, job.seed, job.quality) == (72, 80, 3, 0, 55)
    assert job.exact
    assert response.request_id == "my.request-1_A"
    first, second = response.images
    assert (first.seed, second.seed) == (0, 1)
    assert (first.width, first.height) == (72, 80)
    expected = generation_pb2.GenerateRequest(**{**fields, "seed": 1, "image_count": 1})
    expected.ClearField("request_id")
    assert second.replay.request == expected


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "RAW_RGB"])
async def test_a_replay_record_generates_the_same_bytes(format: str) -> None:
    async with serving(fake=AUTO) as wire:
        number = types_pb2.ImageFormat.Value(f"IMAGE_FORMAT_{format}")
        first = await wire.generate(format=number)
        record = first.images[0].replay
        for name, field in record.request.DESCRIPTOR.fields_by_name.items():
            unused = name == "quality" and format in ("PNG", "RAW_RGB")
            unused |= name in OPTIONAL_FIELDS and name not in fake_model().optional_fields
            if field.has_presence and not unused:
                assert record.request.HasField(name), name
        again = await wire.generation.Generate(record.request)
    assert again.images[0].data == first.images[0].data
    assert again.images[0].replay == record


async def test_a_withheld_image_is_not_an_error() -> None:
    async with serving(fake=AUTO) as wire:
        response = await wire.generate("[flagged]")
    assert response.images[0].flagged
    assert not response.images[0].data


async def test_an_unset_seed_is_random() -> None:
    async with serving(fake=AUTO) as wire:
        seeds = [(await wire.generate()).images[0].seed for _ in range(2)]
    assert seeds[0] != seeds[1]


async def test_calls_share_the_engine() -> None:
    async with serving() as wire:
        calls = [wire.generating(steps=steps) for steps in (1, 2)]
        for _ in calls:
            await wire.submitted.get()
        wire.engine.advance(1)
        await calls[0]
        assert not calls[1].done()
        wire.engine.advance(1)
        await calls[1]


async def test_cancelling_the_call_cancels_the_job() -> None:
    async with serving() as wire:
        call = wire.generation.Generate(generation_pb2.GenerateRequest(prompt="a star"))
        other = wire.generating(prompt="other")
        # The two may arrive in either order.
        jobs = {job.prompt: job.id for job in [await wire.submitted.get() for _ in range(2)]}
        call.cancel()
        assert await wire.cancelled.get() == jobs["a star"]
        wire.engine.advance(4)
        assert (await other).images
        assert wire.server.dispatcher.counts.by_end == {
            JobOutcome.CANCELLED: 1,
            JobOutcome.FINISHED: 1,
        }


async def test_a_lost_connection_cancels_the_job() -> None:
    async with serving() as wire:
        async with grpc.aio.insecure_channel(wire.server.address) as channel:
            stub = type(wire.generation)(channel)
            call = stub.Generate(generation_pb2.GenerateRequest(prompt="a star"))
            job = await wire.submitted.get()
        assert await wire.cancelled.get() == job.id
        assert call.done()


async def test_a_deadline_reaches_the_job() -> None:
    async with serving() as wire:
        request = generation_pb2.GenerateRequest(prompt="a star")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await wire.generation.Generate(request, timeout=2.0)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        job = await wire.submitted.get()
        assert job.deadline is not None
        # gRPC rounds the remaining time up, by a hundredth of it at most.
        assert 0.0 < job.deadline - job.submitted_at <= 2.1
        assert await wire.cancelled.get() == job.id
        assert wire.server.dispatcher.counts.by_end == {JobOutcome.EXPIRED: 1}


async def test_a_full_queue_says_when_to_try_again() -> None:
    limits = Dispatch(max_queued_jobs=0, max_resident_samples=1)
    async with serving(dispatch=limits) as wire:
        first = wire.generating()
        await wire.submitted.get()
        error = await refusal(wire.generate())
        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.info.reason == "QUEUE_FULL"
        assert error.trailers["grpc-retry-pushback-ms"] == "1000"
        wire.engine.advance(4)
        await first


async def test_a_failure_keeps_its_reason_and_message() -> None:
    async with serving() as wire:
        call = wire.generating()
        job = await wire.submitted.get()
        wire.engine.fail(job.id, Failure(Reason.NON_FINITE, "not a number", {"step": "3"}))
        error = await refusal(call)
    assert error.code is grpc.StatusCode.INTERNAL
    assert error.message == "not a number"
    assert (error.info.reason, dict(error.info.metadata)) == ("NON_FINITE", {"step": "3"})


async def test_an_image_that_never_fits_must_not_be_retried() -> None:
    async with serving(fake=AUTO) as wire:
        raise_limit = (("darkroom-max-reply-bytes", "99999999"),)
        request = generation_pb2.GenerateRequest(prompt="a star", width=2048, height=2048)
        error = await refusal(wire.generation.Generate(request, metadata=raise_limit))
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.info.reason == "DOES_NOT_FIT"
    assert set(error.info.metadata) == {"needed_bytes", "available_bytes"}
    assert error.trailers["grpc-retry-pushback-ms"] == "-1"


async def test_jobs_run_again_when_the_engine_dies() -> None:
    async with serving() as wire:
        call = wire.generating()
        job = await wire.submitted.get()
        wire.engine.advance()
        wire.engine.die()
        assert await wire.submitted.get() == job
        wire.engine.advance(job.steps)
        assert len((await call).images) == 1


async def test_jobs_fail_if_no_engine_restarts() -> None:
    async with serving(engine=Engine(engine_max_restarts=0)) as wire:
        call = wire.generating()
        await wire.submitted.get()
        wire.engine.die()
        error = await refusal(call)
        assert error.code is grpc.StatusCode.INTERNAL
        assert error.info.reason == "ENGINE_FAILED"
        with pytest.raises(Exception, match="made to die"):
            await asyncio.wait_for(wire.serve, 5)
